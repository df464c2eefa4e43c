"""Metrics over subsets of features [n, d]: their mean, and standard errors by the jackknife."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.runtime.random import torch_generator

NUM_SUBSETS, MOST_COMPONENTS = 4, 64
"""Disjoint subsets over which a measure is averaged for its error; dimensions of the PCA form of a Fréchet distance."""


NUM_GROUPS = 20
"""Of a jackknife."""


def jackknife_error(replicates: Tensor) -> float:
    """Standard error from replicates [g], each without one of g groups: sqrt((g - 1) var), var with 1 / g."""
    return math.sqrt((len(replicates) - 1) * replicates.double().var(correction=0).item())


def over_subsets(
    metric: Callable[[Tensor, Tensor], Sequence[float]],
    samples: Tensor,
    reference: Tensor,
    *,
    num_subsets: int = NUM_SUBSETS,
    seed: int = 0,
    paired: bool = False,
) -> list[tuple[float, float]]:
    """Mean and standard error of each value of a metric over disjoint subsets of both sets, all of one size.

    Args:
        metric: (samples, reference) -> values.
        samples, reference: [n, d] and [m, d]; subsets have min(n, m) // num_subsets of each, drawn with the seed.
        paired: Row i of both belongs together: subsets have the same rows of both.

    Returns:
        (mean, standard error) per value.
    """
    size = min(len(samples), len(reference)) // num_subsets
    generator = torch_generator(seed)
    order = torch.randperm(len(samples), generator=generator)
    other = order if paired else torch.randperm(len(reference), generator=generator)
    parts = [
        features[chosen[: size * num_subsets]].double().split(size)
        for features, chosen in ((samples, order), (reference, other))
    ]
    values = torch.tensor([metric(a, b) for a, b in zip(*parts, strict=True)], dtype=torch.float64)
    errors = values.std(0) / num_subsets**0.5
    return list(zip(values.mean(0).tolist(), errors.tolist(), strict=True))
