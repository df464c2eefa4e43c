"""Figures of reconstructions: their rate, their codes, and distances to the images they are of."""

import math
from typing import Any

import torch
from torch import Tensor

from ldm.evaluation.feature_metrics import NUM_GROUPS, frechet_interval
from ldm.evaluation.metrics import (
    MOST_COMPONENTS,
    NUM_SUBSETS,
    feature_components,
    frechet_distance,
    kernel_distance,
)


def kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(q(z_raw|x) || N(0, I)) per image in nats, [b], of moments [b, C, h, w]; in float64."""
    mean, log_variance = mean.cpu().double(), log_variance.cpu().double()
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3))


def rate(nats: Tensor | None, num_values: int) -> dict[str, float | None]:
    """The mean KL of images of so many pixel values, in three units; None where there is no density."""
    if nats is None:
        return {"kl_nats": None, "kl_bits": None, "kl_bits_per_value": None}
    mean = nats.mean().item()
    bits = mean / math.log(2)
    return {"kl_nats": mean, "kl_bits": bits, "kl_bits_per_value": bits / num_values}


def codebook(counts: Tensor | None) -> dict[str, Any]:
    """Share of the codes in use, and exp of the entropy of how often each one is; None where there are none."""
    if counts is None:
        return {"codebook_size": None, "codebook_usage": None, "codebook_perplexity": None}
    counts = counts.cpu()  # float64 is not for every accelerator
    entropy = torch.special.entr(counts.double() / counts.sum()).sum()
    usage = (counts > 0).double().mean().item()
    return {"codebook_size": len(counts), "codebook_usage": usage, "codebook_perplexity": entropy.exp().item()}


def distances(reconstructed: Tensor, own: Tensor, train: Tensor) -> dict[str, Any]:
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
