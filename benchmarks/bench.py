"""What our code costs beside the bare work: the training loop, and with run= the bound or the losses of stage 1."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("bench", "benchmarks.costs:bench")
