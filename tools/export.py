"""Export a trained model for diffusers, with a model card, and optionally upload it to the Hugging Face Hub."""

from ldm.cli.main import run

if __name__ == "__main__":
    run("export", "ldm.commands.export:export")
