"""Train one stage: first stage=vae, then stage=diffusion.

python -m ldm.train stage=vae|diffusion [group=choice ...] [key=value ...]
"""

from ldm.cli.main import run


def main() -> None:
    """`python -m ldm.train`; `ldm.training.session.train` tells what it does."""
    run("train", "ldm.training.session:train")


if __name__ == "__main__":
    main()
