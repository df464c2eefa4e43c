"""Pure functions of tensors: distortion, distances between sets of features, codes; and reports of what they find."""
