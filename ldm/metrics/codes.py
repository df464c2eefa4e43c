"""What the codes of an autoencoder hold: KL, rate, use of a codebook."""

import math
from typing import Any

import torch
from torch import Tensor


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
