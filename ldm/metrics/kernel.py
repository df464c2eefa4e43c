"""Kernel distances between two sets of features, and the Vendi score for the diversity of one set."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.metrics.neighbours import chunk_size, squared_distances
from ldm.metrics.subsets import NUM_SUBSETS, mean_over_subsets


def kernel_distance(
    samples: Tensor, reference: Tensor, *, num_subsets: int = NUM_SUBSETS, seed: int = 0, paired: bool = False
) -> tuple[float, float]:
    """Return the kernel distance between two sets of features, averaged over disjoint subsets of both sets.

        KD = unbiased MMD^2 with k(a, b) = (a.b / d + 1)^3

    With Inception features, this is the KID. Source: Binkowski et al. 2018, arXiv:1801.01401.

    Args:
        samples, reference: Features [n, d] and [m, d].
        paired: Treat row i of both sets as a pair, such as an image and its reconstruction. Kernel values within pairs
            are then excluded, because they would bias the estimate downwards. Source: Gretton et al. 2012, "A kernel
            two-sample test", eq. 4.

    Returns:
        The mean over the subsets and its standard error, computed in float64. Each subset needs at least two rows.
    """

    def distance(a: Tensor, b: Tensor) -> tuple[float]:
        return (_mmd2(a, b, paired).item(),)

    return mean_over_subsets(distance, samples, reference, num_subsets=num_subsets, seed=seed, paired=paired)[0]


def _mmd2(a: Tensor, b: Tensor, paired: bool = False) -> Tensor:
    n, m = len(a), len(b)
    k_aa, k_bb, k_ab = (_polynomial(x, y) for x, y in ((a, a), (b, b), (a, b)))
    within_a = (k_aa.sum() - k_aa.trace()) / (n * (n - 1))
    within_b = (k_bb.sum() - k_bb.trace()) / (m * (m - 1))
    across = (k_ab.sum() - k_ab.trace()) / (n * (n - 1)) if paired else k_ab.mean()
    return within_a + within_b - 2 * across


def _polynomial(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def cmmd(samples: Tensor, reference: Tensor, *, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Return the squared maximum mean discrepancy of unit-length features under a Gaussian kernel.

        CMMD = scale (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)),   k(a, b) = exp(-|a - b|^2 / (2 sigma^2))

    This is the biased V-statistic of the authors' code, which includes the kernel of each feature with itself, whereas
    eq. 4 of the paper is the unbiased estimator. The V-statistic is never negative, and its expectation for two sets
    from the same distribution is about scale (1/n + 1/m) (1 - mean k). Features are normalised to unit length, as in
    the authors' code. Source: Jayasumana et al. 2024, arXiv:2401.09603, section 4.

    Args:
        samples, reference: CLIP embeddings, [n, d] and [m, d].
    """
    x, y = (F.normalize(features.double(), dim=1) for features in (samples, reference))
    means = [_mean_kernel(a, b, sigma) for a, b in ((x, x), (y, y), (x, y))]
    return scale * max(0.0, means[0] + means[1] - 2 * means[2])


def _mean_kernel(a: Tensor, b: Tensor, sigma: float) -> float:
    total = 0.0
    for rows in a.split(chunk_size(len(b))):
        # sum k - 1 instead of k: all values are close to 1, and only the small remainder distinguishes the sets
        total += torch.expm1(-squared_distances(rows, b) / (2 * sigma**2)).sum().item()
    return 1 + total / (len(a) * len(b))


def vendi_score(features: Tensor) -> float:
    """Return the effective number of distinct images, from 1 to n: exp(-sum_i l_i log l_i).

    l_i are the eigenvalues of K / n, where K = X X^T is the matrix of cosine similarities and the rows of X are the
    normalised features. The d x d matrix X^T X / n has the same nonzero eigenvalues, so the cost is linear in n.
    Source: Friedman and Dieng 2022, arXiv:2210.02410.
    """
    n, d = features.shape
    if n <= d:
        unit = F.normalize(features.double(), dim=1)
        kernel = unit @ unit.T
    else:
        kernel = torch.zeros(d, d, dtype=torch.float64)
        for unit in F.normalize(features, dim=1).split(1024):
            kernel += (unit.T @ unit).double()
    eigenvalues = torch.linalg.eigvalsh(kernel / n).clamp(min=0)
    return math.exp(torch.special.entr(eigenvalues).sum().item())
