"""Fréchet distances between sets of features, and their jackknife replicates."""

import torch
from torch import Tensor

from ldm.metrics.subsets import NUM_GROUPS


def frechet_distance(samples: Tensor, reference: Tensor) -> float:
    """Return the Fréchet distance between Gaussians fitted to two sets of features, in float64.

        FD = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^{1/2})

    The trace of (C_1 C_2)^{1/2} is the sum of the singular values of C_1^{1/2} C_2^{1/2}. Computing it this way avoids
    the square root of a non-symmetric matrix and stays accurate for rank-deficient covariances.

    With Inception features, this is the FID. The distance is biased upwards for small sets, so compare values only for
    sets of equal size.
    Source: Heusel et al. 2017, arXiv:1706.08500, eq. 6.

    Args:
        samples, reference: Features [n, d] and [m, d].

    Raises:
        ValueError: If either set has fewer than 2 d features, because its covariance would be mostly noise.
    """
    dim = samples.shape[1]
    if min(len(samples), len(reference)) < 2 * dim:
        raise ValueError(
            f"A Fréchet distance in {dim} dimensions needs at least {2 * dim} features per set, but the sets have "
            f"{len(samples)} and {len(reference)}. Project both sets to fewer dimensions with feature_components."
        )
    (mean_1, covariance_1), (mean_2, covariance_2) = moments(samples), moments(reference)
    overlap = torch.linalg.svdvals(symmetric_sqrt(covariance_1) @ symmetric_sqrt(covariance_2)).sum()
    traces = covariance_1.trace() + covariance_2.trace()
    return ((mean_1 - mean_2).square().sum() + traces - 2 * overlap).clamp(min=0).item()


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [d] and covariance [d, d] of features [n, d], in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1)


def symmetric_sqrt(covariance: Tensor) -> Tensor:
    """Return C^{1/2}. Eigenvalues that are negative due to rounding are set to 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def feature_components(train_features: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the mean [d] and the first `dim` principal components [d, dim] of training features [n, d], in float64.

    With few samples, compare Fréchet distances of the projections `(x - mean) @ basis`. The components are fitted to
    training images only, so that no set under comparison determines its own projection.
    """
    mean, covariance = moments(train_features)
    return mean, torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :dim]


def frechet_replicates(
    samples: Tensor, reference: Tensor, *, num_groups: int = NUM_GROUPS, paired: bool = False
) -> tuple[float, Tensor]:
    """Return the Fréchet distance and its delete-d jackknife replicates [g], each without one group of samples.

    Replicate FD_i is the distance without group i. `jackknife_error` returns the standard error se of the distance:

        se^2 = (g - 1) / g sum_i (FD_i - mean FD)^2

    A bootstrap would be misleading: its resamples contain duplicates, which shift the distance, so the interval may not
    even contain the estimate. The standard error covers only the sampling noise of `samples`. The reference is treated
    as fixed, and the bias due to the finite sample size remains. Group i consists of the rows i, i + g, i + 2 g, ...

    To compare two sets of samples with paired rows, compute the standard error of the difference between their
    distances from the differences between their replicates.

    Source: Shao and Wu 1989, "A general theory for jackknife variance estimation"; Busing et al. 1999, "Delete-m
    jackknife for unequal m", in the special case of groups of equal size.

    Args:
        samples, reference: Features [n, d] and [m, d].
        paired: Treat row i of both sets as a pair, such as an image and its reconstruction. Each group is then removed
            from both sets.
    """
    value = frechet_distance(samples, reference)
    replicates = torch.empty(num_groups, dtype=torch.float64)
    for group in range(num_groups):
        rows = torch.arange(len(samples)) % num_groups != group
        mean_1, covariance_1 = moments(samples[rows])
        if paired or group == 0:
            mean_2, covariance_2 = moments(reference[rows] if paired else reference)
            root_2, trace_2 = symmetric_sqrt(covariance_2), covariance_2.trace()
        # eigvalsh is four times faster than svdvals, and its loss of precision is the same for all replicates
        overlap = torch.linalg.eigvalsh(root_2 @ covariance_1 @ root_2).clamp(min=0).sqrt().sum()
        replicates[group] = (mean_1 - mean_2).square().sum() + covariance_1.trace() + trace_2 - 2 * overlap
    return value, replicates
