"""Decode the latents in a safetensors file into images."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("decode", "ldm.commands.decode:decode_latents")
