"""Evaluation of samples: how close their distribution is to that of the data."""
