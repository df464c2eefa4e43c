"""Latent reports: how many latent dimensions a data set needs."""
