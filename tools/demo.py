"""Generate the demo's images (16 prompts, 16 held-out captions, the reverse chain) and compute its metrics."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("demo", "ldm.commands.demo:demo")
