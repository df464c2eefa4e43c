"""What the demo shows: a grid of 16 prompts, one of 16 held-out captions, the reverse chain, and its figures."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("demo", "ldm.commands.demo:demo")
