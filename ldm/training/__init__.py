"""Training of both stages with Lightning."""
