"""Fréchet distances between sets of features, with their standard errors."""

import torch
from torch import Tensor

from ldm.metrics.subsets import NUM_GROUPS


def frechet_distance(samples: Tensor, reference: Tensor) -> float:
    """Fréchet distance between Gaussians of the moments of two sets of features, in float64:

        FD = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^{1/2})

    The trace of (C_1 C_2)^{1/2} is the sum of the singular values of C_1^{1/2} C_2^{1/2}, which needs no root of a
    matrix that is not symmetric and keeps its precision where covariances have no full rank.

    Called FID where the features are Inception's. It grows with fewer samples: compare it at equal N only. Source:
    Heusel et al. 2017, arXiv:1706.08500, eq. 6.

    Args:
        samples, reference: [n, d] and [m, d].

    Raises:
        ValueError: fewer than 2 d of either, whose covariance is mostly noise.
    """
    dim = samples.shape[1]
    if min(len(samples), len(reference)) < 2 * dim:
        raise ValueError(
            f"{len(samples)} and {len(reference)} features of {dim} dimensions: a Fréchet distance needs {2 * dim} of "
            "each at least. Use its PCA form, in fewer dimensions: project both with feature_components."
        )
    (mean_1, covariance_1), (mean_2, covariance_2) = moments(samples), moments(reference)
    overlap = torch.linalg.svdvals(symmetric_root(covariance_1) @ symmetric_root(covariance_2)).sum()
    traces = covariance_1.trace() + covariance_2.trace()
    return ((mean_1 - mean_2).square().sum() + traces - 2 * overlap).clamp(min=0).item()


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and covariance [d, d] of features [n, d], in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1)


def symmetric_root(covariance: Tensor) -> Tensor:
    """C^{1/2}; what rounding made negative among the eigenvalues is 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def feature_components(train_features: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The first `dim` principal components of training features [n, d]: a mean [d] and a basis [d, dim] in float64.

    `(x - mean) @ basis` is what a Fréchet distance of few samples compares. The components come from training images
    alone, so that no set that is compared chooses its own.
    """
    mean, covariance = moments(train_features)
    return mean, torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :dim]


def frechet_replicates(
    samples: Tensor, reference: Tensor, *, num_groups: int = NUM_GROUPS, paired: bool = False
) -> tuple[float, Tensor]:
    """Fréchet distance, and what it is without each group of the samples, [g]: for the delete-d jackknife.

        se^2 = (g - 1) / g sum_i (FD_i - mean FD)^2,   FD_i without group i of g: `jackknife_error`

    A bootstrap is not used: its duplicates shift the distance, so that its interval need not hold the estimate. The
    error is that of drawing other samples; the reference stays, and so does the bias of a finite N. Groups are rows
    i, i + g, i + 2 g, ... Of sets that share their images in the same rows, the error of a difference is that of the
    differences of these. Source: Shao and Wu 1989, "A general theory for jackknife variance estimation"; Busing et
    al. 1999, "Delete-m jackknife for unequal m", of whose groups ours are the equal ones.

    Args:
        samples, reference: [n, d] and [m, d].
        paired: Row i of both belongs together, as an image and its reconstruction do: a group is left out of both.
    """
    value = frechet_distance(samples, reference)
    without = torch.empty(num_groups, dtype=torch.float64)
    for group in range(num_groups):
        kept = torch.arange(len(samples)) % num_groups != group
        other_mean, other = moments(samples[kept])
        if paired or group == 0:
            mean, covariance = moments(reference[kept] if paired else reference)
            root, trace = symmetric_root(covariance), covariance.trace()
        # eigenvalues cost a quarter of singular values; what they lose of precision all replicates lose alike
        overlap = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
        without[group] = (other_mean - mean).square().sum() + other.trace() + trace - 2 * overlap
    return value, without
