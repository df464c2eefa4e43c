"""Check a data set before training: duplicates, class balance, captions, coverage and diversity."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("data", "ldm.commands.data:data")
