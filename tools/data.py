"""What is in a data set, before anything is trained on it: copies, balance, captions, coverage and diversity."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("data", "ldm.commands.data:data")
