"""Likelihood of images under both stages, in bits per dimension."""
