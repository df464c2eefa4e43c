"""Optimizers, averages, budget and precision."""
