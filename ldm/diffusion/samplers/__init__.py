"""From noise z_T down the chain to z_0: one class per algorithm."""
