"""Pure functions of tensors: distortion, distances between sets of features, codes."""
