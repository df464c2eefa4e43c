"""How many latent dimensions do images need?"""
