"""Trained parts -> images."""
