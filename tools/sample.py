"""Generate images with a trained model: PNG files, a grid, and a JSON file with the settings."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("sample", "ldm.commands.sample:sample")
