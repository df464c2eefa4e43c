"""Standard errors of metrics of features [n, d], from disjoint subsets or the jackknife."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.runtime.random import torch_generator

NUM_SUBSETS, MAX_COMPONENTS = 4, 64
"""Disjoint subsets that a metric is averaged over; largest dimension of a Fréchet distance after PCA."""


NUM_GROUPS = 20
"""Number of groups of the jackknife."""


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
        samples, reference: Features [n, d] and [m, d]. Each subset has min(n, m) // num_subsets rows of either set.
        seed: Determines which rows form a subset.
        paired: Row i of both sets belongs together, so subsets consist of the same rows of both.

    Returns:
        (mean, standard error) of each value.
    """
    size = min(len(samples), len(reference)) // num_subsets
    generator = torch_generator(seed)
    order = torch.randperm(len(samples), generator=generator)
    other = order if paired else torch.randperm(len(reference), generator=generator)
    parts = [
        features[rows[: size * num_subsets]].double().split(size)
        for features, rows in ((samples, order), (reference, other))
    ]
    values = torch.tensor([metric(a, b) for a, b in zip(*parts, strict=True)], dtype=torch.float64)
    errors = values.std(0) / num_subsets**0.5
    return list(zip(values.mean(0).tolist(), errors.tolist(), strict=True))
