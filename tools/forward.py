"""Show the forward chain on one image, with z_t decoded at several t."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("forward", "ldm.commands.forward:forward")
