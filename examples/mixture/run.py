"""Sample a mixture of five Gaussians with a trained network and with the exact denoiser."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("mixture", "examples.mixture.study:mixture")
