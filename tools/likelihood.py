"""How many bits per dimension a run needs for its images: the two-stage bound, term by term."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("likelihood", "ldm.commands.likelihood:likelihood")
