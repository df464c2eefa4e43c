"""Measure the quality of a run: an autoencoder's reconstructions or a diffusion model's samples."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("evaluate", "ldm.commands.evaluate:evaluate", lists=("sampler.steps", "guidance"))
