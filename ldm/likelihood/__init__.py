"""Likelihood of images under the autoencoder and the diffusion model, in bits per dimension."""
