"""Sampling images from a trained model."""
