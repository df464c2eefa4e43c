"""Encode a folder of images into latents in a safetensors file."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("encode", "ldm.commands.encode:encode_images")
