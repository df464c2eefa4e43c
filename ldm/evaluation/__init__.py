"""Evaluation of runs, data sets and latents: one folder per question."""
