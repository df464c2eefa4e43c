"""Metrics of an autoencoder's latent codes: KL divergence, rate and codebook usage."""

import math
from typing import Any

import torch
from torch import Tensor


def kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(q(z_raw|x) || N(0, I)) for each image in nats, [b], computed in float64 from moments [b, C, h, w]."""
    mean, log_variance = mean.cpu().double(), log_variance.cpu().double()
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3))


def kl_metrics(nats: Tensor | None, num_values: int) -> dict[str, float | None]:
    """Return the mean KL per image in nats, in bits, and in bits per pixel value.

    Args:
        nats: KL of each image, [b]; None for a model without a density, in which case all metrics are None.
        num_values: Number of pixel values per image.
    """
    if nats is None:
        return {"kl_nats": None, "kl_bits": None, "kl_bits_per_value": None}
    mean = nats.mean().item()
    bits = mean / math.log(2)
    return {"kl_nats": mean, "kl_bits": bits, "kl_bits_per_value": bits / num_values}


def codebook_metrics(counts: Tensor | None) -> dict[str, Any]:
    """Return the size of a codebook, the fraction of codes used, and the perplexity of the code frequencies.

    Args:
        counts: Number of uses of each code, [n]; None for a model without a codebook, in which case all metrics are
            None.
    """
    if counts is None:
        return {"codebook_size": None, "codebook_usage": None, "codebook_perplexity": None}
    counts = counts.cpu()  # not every accelerator supports float64
    entropy = torch.special.entr(counts.double() / counts.sum()).sum()
    usage = (counts > 0).double().mean().item()
    return {"codebook_size": len(counts), "codebook_usage": usage, "codebook_perplexity": entropy.exp().item()}
