"""Metrics of reconstructions: their rate, their codes, and distances to the images they are of."""

from typing import Any

from torch import Tensor

from ldm.metrics.frechet import feature_components, frechet_distance, frechet_interval
from ldm.metrics.kernel import kernel_distance
from ldm.metrics.metric import UNMEASURED, Metric
from ldm.metrics.subsets import MOST_COMPONENTS, NUM_GROUPS, NUM_SUBSETS


def reconstruction_distances(reconstructed: Tensor, own: Tensor, train: Tensor) -> dict[str, Any]:
    """FD and KD of reconstructions to the originals of the same images, and of those to the training images.

    FD is on the first principal components of the training images where one of the sets has fewer than 2 d images; KD
    is not measured where there are too few for its subsets, nor FD's error where there are too few for two groups. An
    image and its reconstruction are left out together.

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
    found: dict[str, Any] = {
        "feature_dim": dim,
        "fd_components": components,
        "num_reference": len(train),
    }
    groups = min(NUM_GROUPS, len(own) // 2)
    for name, (first, second) in {"reconstructions": seen[:2], "validation": seen[1:]}.items():
        found[f"fd_{name}"] = (
            Metric(*frechet_interval(first, second, num_groups=groups, paired=name == "reconstructions"), n=len(first))
            if groups >= 2
            else Metric(frechet_distance(first, second), n=len(first))
        )
    for name, first, second in (("reconstructions", reconstructed, own), ("validation", own, train)):
        enough = num >= 2 * NUM_SUBSETS
        paired = name == "reconstructions"
        found[f"kd_{name}"] = (
            Metric(*kernel_distance(first, second, paired=paired), n=len(first)) if enough else UNMEASURED
        )
    return found
