"""Comparison of runs: which run is better, and does the difference exceed the noise?"""
