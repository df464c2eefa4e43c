"""Evaluation of data sets, latents, reconstructions and samples, and comparison of runs, in one folder each."""
