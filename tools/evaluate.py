"""Figures of a run: what an autoencoder loses of held-out images, or how near samples are to the training images."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("evaluate", "ldm.commands.evaluate:evaluate", lists=("sampler.steps", "guidance"))
