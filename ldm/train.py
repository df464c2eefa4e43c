"""Train one stage, stage=vae or stage=diffusion, or both with stage=all.

python -m ldm.train stage=vae|diffusion|all [group=choice ...] [key=value ...]
"""

from ldm.cli.main import run


def main() -> None:
    """`python -m ldm.train`; `ldm.commands.train.train` tells what it does."""
    run("train", "ldm.commands.train:train")


if __name__ == "__main__":
    main()
