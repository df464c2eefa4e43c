"""Which of several runs is better, and is the difference noise?"""
