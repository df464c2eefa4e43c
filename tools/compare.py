"""Compare runs: which one is better, and is the difference more than noise?"""

from ldm.cli.main import run

if __name__ == "__main__":
    run("compare", "ldm.commands.compare:compare", positional="runs")
