"""The two training stages: autoencoder and diffusion model."""
