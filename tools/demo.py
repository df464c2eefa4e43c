"""Draw the demo's images and compute its metrics: 16 prompts, 16 held-out captions, and the reverse chain."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("demo", "ldm.commands.demo:demo")
