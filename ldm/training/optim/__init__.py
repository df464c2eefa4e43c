"""Optimizers, EMA weights, training budget and precision."""
