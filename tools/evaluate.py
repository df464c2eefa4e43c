"""Measure the quality of a run: an autoencoder's reconstructions, or the samples of a diffusion model."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("evaluate", "ldm.commands.evaluate:evaluate", lists=("sampler.steps", "guidance"))
