"""Evaluation of autoencoders by their reconstructions."""
