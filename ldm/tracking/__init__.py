"""The home of W&B."""
