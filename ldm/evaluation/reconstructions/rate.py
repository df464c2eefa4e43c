"""Figures of reconstructions: their rate, their codes, and distances to the images they are of."""

from typing import Any

from torch import Tensor

from ldm.metrics.frechet import feature_components, frechet_distance, frechet_interval
from ldm.metrics.kernel import kernel_distance
from ldm.metrics.subsets import MOST_COMPONENTS, NUM_GROUPS, NUM_SUBSETS


def reconstruction_distances(reconstructed: Tensor, own: Tensor, train: Tensor) -> dict[str, Any]:
    """FD and KD of reconstructions to the originals of the same images, and of those to the training images.

    FD is on the first principal components of the training images where one of the sets has fewer than 2 d images; KD
    is None where there are too few for its subsets, and FD's error where there are too few for two groups. An image and
    its reconstruction are left out together.

    Args:
        reconstructed, own: Features [n, d], row by row of the same image.
        train: [m, d].
    """
    num, dim = min(len(own), len(train)), own.shape[1]
    components = None if num >= 2 * dim else min(MOST_COMPONENTS, num // 2)
    seen = [reconstructed, own, train]
    if components is not None:
        mean, basis = feature_components(train, components)
        seen = [(part.double() - mean) @ basis for part in seen]
    figures: dict[str, Any] = {
        "feature_dim": dim,
        "fd_components": components,
        "num_reference": len(train),
    }
    groups = min(NUM_GROUPS, len(own) // 2)
    for name, place in (("reconstructions", 0), ("validation", 1)):
        first, second = seen[place : place + 2]
        figures[f"fd_{name}"], figures[f"fd_{name}_standard_error"] = (
            frechet_interval(first, second, num_groups=groups, paired=place == 0)
            if groups >= 2
            else (frechet_distance(first, second), None)
        )
    for name, first, second in (("reconstructions", reconstructed, own), ("validation", own, train)):
        figures[f"kd_{name}"] = figures[f"kd_{name}_standard_error"] = None
        if num >= 2 * NUM_SUBSETS:
            mean_and_error = kernel_distance(first, second, num_subsets=NUM_SUBSETS, paired=first is reconstructed)
            figures[f"kd_{name}"], figures[f"kd_{name}_standard_error"] = mean_and_error
    return figures
