"""Train a latent diffusion model of your own, end to end."""
