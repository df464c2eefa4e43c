"""Data set reports: what a data set contains."""
