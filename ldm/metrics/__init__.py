"""Metrics of images and of their features, the networks that compute features, and reports."""
