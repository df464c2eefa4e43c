"""Samplers from noise z_T to z_0, one class per algorithm."""
