"""Evaluation of autoencoders: how much is lost in reconstructions."""
