"""Compute the likelihood of images under a run, in bits per dimension: the two-stage bound, term by term."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("likelihood", "ldm.commands.likelihood:likelihood")
