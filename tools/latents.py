"""How many latent dimensions images need: of one autoencoder, its channels and spectra; of a sweep, sizes compared."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("latents", "ldm.commands.latents:latents")
