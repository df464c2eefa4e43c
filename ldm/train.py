"""Train one stage, stage=vae or stage=diffusion, or both with stage=all.

Usage: python -m ldm.train stage=vae|diffusion|all [group=choice ...] [key=value ...]
"""

from ldm.cli.main import run


def main() -> None:
    """Entry point of `python -m ldm.train`; see `ldm.commands.train.train`."""
    run("train", "ldm.commands.train:train")


if __name__ == "__main__":
    main()
