"""Draw images with a trained model: PNGs, a grid and a JSON with what made them."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("sample", "ldm.commands.sample:sample")
