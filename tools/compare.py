"""Which run is better, and is the difference more than noise? A table, a page, curves and images of several runs."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("compare", "ldm.commands.compare:compare", positional="runs")
