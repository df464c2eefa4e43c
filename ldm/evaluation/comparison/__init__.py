"""Comparison of runs: which one is better, and is the difference more than noise?"""
