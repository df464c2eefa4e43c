"""Find out how many latent dimensions images need: measure one autoencoder, or train and compare several sizes."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("latents", "ldm.commands.latents:latents")
