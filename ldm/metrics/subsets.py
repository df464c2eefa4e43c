"""Standard errors of metrics that compare sets of features [n, d], from disjoint subsets or the jackknife."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.runtime.random import torch_generator

NUM_SUBSETS, MAX_COMPONENTS = 4, 64
"""Number of disjoint subsets to average a metric over, and maximum number of PCA components for a Fréchet distance."""


NUM_GROUPS = 20
"""Number of jackknife groups."""


def jackknife_error(replicates: Tensor) -> float:
    """Return the standard error sqrt((g - 1) var) from g replicates, where var is their population variance."""
    return math.sqrt((len(replicates) - 1) * replicates.double().var(correction=0).item())


def mean_over_subsets(
    metric: Callable[[Tensor, Tensor], Sequence[float]],
    samples: Tensor,
    reference: Tensor,
    *,
    num_subsets: int = NUM_SUBSETS,
    seed: int = 0,
    paired: bool = False,
) -> list[tuple[float, float]]:
    """Return the mean and standard error of each value of a metric over disjoint, equally sized subsets of both sets.

    Args:
        metric: Function (samples, reference) -> values.
        samples, reference: Features [n, d] and [m, d]. Each subset has min(n, m) // num_subsets rows of each set.
        seed: Determines the rows of each subset.
        paired: Treat row i of both sets as a pair, so that both sets are split in the same way.

    Returns:
        (mean, standard error) of each value.
    """
    size = min(len(samples), len(reference)) // num_subsets
    generator = torch_generator(seed)
    order = torch.randperm(len(samples), generator=generator)
    reference_order = order if paired else torch.randperm(len(reference), generator=generator)
    subsets = [
        features[rows[: size * num_subsets]].double().split(size)
        for features, rows in ((samples, order), (reference, reference_order))
    ]
    values = torch.tensor([metric(a, b) for a, b in zip(*subsets, strict=True)], dtype=torch.float64)
    errors = values.std(0) / num_subsets**0.5
    return list(zip(values.mean(0).tolist(), errors.tolist(), strict=True))
