"""Benchmark the training loop or, with run=, the variational bound or the losses of stage 1."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("bench", "benchmarks.costs:bench")
