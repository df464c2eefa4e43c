"""Numbers that compare images: distortion, distances between sets of features, retrieval."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from ldm.autoencoder.spectrum import fold, patch_components, unfold

NUM_SUBSETS, MOST_COMPONENTS = 4, 64
"""Disjoint subsets over which a measure is averaged for its error; dimensions of the PCA form of a Fréchet distance."""
MOST_SIMILARITIES = 2**24
"""That are held at once."""


def psnr(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per image, [b]; both [b, c, H, W] in [-1, 1], so the peak is 2."""
    mse = (images.float() - reconstruction.float()).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    return 10 * torch.log10(4 / mse)


def ssim(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Structural similarity per image, [b]; both [b, c, H, W] in [-1, 1], 11 x 11 Gaussian window (torchmetrics).

    Taken on intensities from 0 to 1, as published values are: its luminance term means nothing below 0.
    """
    first, second = ((x.float() + 1) / 2 for x in (reconstruction, images))
    with torch.autocast(first.device.type, enabled=False):  # variances as differences of means: bfloat16 cannot
        values = structural_similarity_index_measure(first, second, data_range=(0.0, 1.0), reduction="none")
    assert isinstance(values, Tensor)
    return values


def pca_reconstruction(train: Tensor, images: Tensor, *, factor: int, channels: int) -> Tensor:
    """Reconstruct from the first `channels` principal components of f x f patches: as many values as a latent.

    Args:
        train: Images that the components are fitted on, [n, 3, H, W] in [-1, 1].
        images: Images to reconstruct, [b, 3, H, W].

    Returns:
        [b, 3, H, W], clamped to [-1, 1].
    """
    return project(patch_components([train], factor), images, factor=factor, channels=channels)


def project(components: tuple[Tensor, Tensor], images: Tensor, *, factor: int, channels: int) -> Tensor:
    """`pca_reconstruction` from the mean and basis of `patch_components`."""
    mean, basis = components[0], components[1][:, :channels]
    return fold((unfold(images, factor) - mean) @ basis @ basis.T + mean, factor).clamp(-1, 1)


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
    require_enough(samples, reference)
    return frechet_of_moments(moments(samples), moments(reference))


def require_enough(samples: Tensor, reference: Tensor) -> None:
    """Refuse sets that are too small for a Fréchet distance in all dimensions."""
    dim = samples.shape[1]
    if min(len(samples), len(reference)) < 2 * dim:
        raise ValueError(
            f"{len(samples)} and {len(reference)} features of {dim} dimensions: a Fréchet distance needs {2 * dim} of "
            "each at least. Use its PCA form, in fewer dimensions: project both with feature_components."
        )


def frechet_of_moments(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """`frechet_distance` of two sets whose `moments` are known."""
    (mean_1, covariance_1), (mean_2, covariance_2) = first, second
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

    Raises:
        ValueError: more components than dimensions, or than the training features span.
    """
    most = min(train_features.shape[1], len(train_features) - 1)
    if not 1 <= dim <= most:
        raise ValueError(f"{dim} components of {len(train_features)} training features: from 1 to {most} exist.")
    features = train_features.double()
    _, basis = torch.linalg.eigh(torch.cov(features.T).reshape(features.shape[1], -1))
    return features.mean(0), basis.flip(1)[:, :dim]


def kernel_distance(
    samples: Tensor, reference: Tensor, *, num_subsets: int = NUM_SUBSETS, seed: int = 0, paired: bool = False
) -> tuple[float, float]:
    """Kernel distance between two sets of features, averaged over disjoint subsets of both.

        KD = unbiased MMD^2 with k(a, b) = (a.b / d + 1)^3

    Called KID where the features are Inception's. Source: Binkowski et al. 2018, arXiv:1801.01401.

    Args:
        samples, reference: [n, d] and [m, d].
        paired: Row i of both belongs together, as an image and its reconstruction do. Kernels within a pair are left
            out then, without which the estimate of dependent sets is biased downwards. Source: Gretton et al. 2012,
            "A kernel two-sample test", eq. 4.

    Returns:
        The mean over the subsets and its standard error, computed in float64.

    Raises:
        ValueError: fewer than two features per subset, or than two subsets; pairs that are not as many on both sides.
    """
    if num_subsets < 2:
        raise ValueError(f"a standard error needs at least two subsets, not {num_subsets}.")
    if paired and len(samples) != len(reference):
        raise ValueError(f"{len(samples)} and {len(reference)} features are no pairs.")
    generator = torch.Generator().manual_seed(seed)
    size = min(len(samples), len(reference)) // num_subsets
    if size < 2:
        raise ValueError(f"{len(samples)} and {len(reference)} features are too few for {num_subsets} subsets.")
    order = torch.randperm(len(samples), generator=generator)
    other = order if paired else torch.randperm(len(reference), generator=generator)
    first, second = (
        features[chosen[: size * num_subsets]].double().split(size)
        for features, chosen in ((samples, order), (reference, other))
    )
    values = torch.stack([_mmd2(a, b, paired) for a, b in zip(first, second, strict=True)])
    return values.mean().item(), (values.std() / num_subsets**0.5).item()


def _mmd2(a: Tensor, b: Tensor, paired: bool = False) -> Tensor:
    n, m = len(a), len(b)
    k_aa, k_bb, k_ab = (_polynomial(x, y) for x, y in ((a, a), (b, b), (a, b)))
    within_a = (k_aa.sum() - k_aa.trace()) / (n * (n - 1))
    within_b = (k_bb.sum() - k_bb.trace()) / (m * (m - 1))
    across = (k_ab.sum() - k_ab.trace()) / (n * (n - 1)) if paired else k_ab.mean()
    return within_a + within_b - 2 * across


def _polynomial(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def retrieval_ranks(queries: Tensor, gallery: Tensor, own: Tensor) -> Tensor:
    """How many gallery images are nearer to each query than its own one; 0 is a hit at 1.

    Args:
        queries: Features of generated images, [q, d].
        gallery: Features of the training images, [n, d].
        own: Gallery row that each query belongs to, [q].

    Returns:
        [q], by cosine similarity.
    """
    queries, gallery = (F.normalize(features, dim=-1) for features in (queries, gallery))
    rows = max(1, MOST_SIMILARITIES // len(gallery))
    ranks = []
    for part, its_own in zip(queries.split(rows), own.split(rows), strict=True):
        similarity = part @ gallery.T
        ranks.append((similarity > similarity.gather(1, its_own[:, None])).sum(dim=1))
    return torch.cat(ranks)
