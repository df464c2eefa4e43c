"""How samples lie among reference images: precision, recall, CMMD, and what a Fréchet distance is uncertain by.

Setting: features are [n, d], compared in float64. Whatever looks at pairs goes block by block, so that nothing of
n x m x d is ever made.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.evaluation.classifier import Classifier
from ldm.evaluation.data_metrics import BLOCK, nearest_distances, squared_distances
from ldm.evaluation.metrics import NUM_SUBSETS, frechet_of_moments, moments, require_enough, symmetric_root

NUM_GROUPS = 20
"""Of a jackknife."""


def precision_recall(samples: Tensor, reference: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Precision: the share of samples on the ground of the reference. Recall: of the reference on that of the samples.

        precision = mean_j [ |y_j - x_i| <= r_i for any i ],   recall the same with x and y exchanged

    r_i is the distance of x_i to its k-th nearest other one of its set. Both depend on the sizes of the sets: compare
    them at equal sizes only. Source: Kynkäänniemi et al. 2019, arXiv:1904.06991, eqs. 1 and 2, where k = 3.

    Args:
        samples, reference: [m, d] and [n, d].

    Raises:
        ValueError: unless 1 <= k < n and k < m.
    """
    return _share_on_ground(samples, reference, k), _share_on_ground(reference, samples, k)


def _share_on_ground(points: Tensor, ground: Tensor, k: int) -> float:
    if not 1 <= k < len(ground):
        raise ValueError(f"k={k} must be at least 1 and below {len(ground)}, the size of either set.")
    points, ground = points.double(), ground.double()
    radii = nearest_distances(ground, ground, k=k, own=torch.arange(len(ground)))[:, -1:]
    centre, inside = ground.mean(dim=0), torch.zeros(len(points), dtype=torch.bool)
    for start in range(0, len(ground), BLOCK):
        rows = slice(start, start + BLOCK)
        for columns in range(0, len(points), 8 * BLOCK):
            part = slice(columns, columns + 8 * BLOCK)
            found = squared_distances(ground[rows] - centre, points[part] - centre).sqrt() <= radii[rows]
            inside[part] |= found.any(dim=0)
    return inside.double().mean().item()


def cmmd(samples: Tensor, reference: Tensor, *, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Squared maximum mean discrepancy under a Gaussian kernel, of features of unit length; made for CLIP's.

        CMMD = scale (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)),   k(a, b) = exp(-|a - b|^2 / (2 sigma^2))

    The biased V-statistic of the authors' code, every feature's kernel with itself included, where the paper's eq. 4
    is the unbiased one: never negative, and of sets of one distribution about scale (1/n + 1/m) (1 - mean k) above 0.
    Features are scaled to unit length, as in that code. Source: Jayasumana et al. 2024, arXiv:2401.09603, section 4.

    Args:
        samples, reference: [n, d] and [m, d].
    """
    x, y = (F.normalize(features.double(), dim=1) for features in (samples, reference))
    means = [_mean_kernel(a, b, sigma) for a, b in ((x, x), (y, y), (x, y))]
    return scale * max(0.0, means[0] + means[1] - 2 * means[2])


def _mean_kernel(a: Tensor, b: Tensor, sigma: float) -> float:
    total = 0.0
    for rows in a.split(BLOCK):
        for columns in b.split(8 * BLOCK):
            # 1 - k first: all kernels are near 1, and only what they lack of it tells the sets apart
            total += torch.expm1(-squared_distances(rows, columns) / (2 * sigma**2)).sum().item()
    return 1 + total / (len(a) * len(b))


def frechet_interval(
    samples: Tensor, reference: Tensor, *, num_groups: int = NUM_GROUPS, paired: bool = False
) -> tuple[float, float]:
    """Fréchet distance, and its standard error by the delete-d jackknife over groups of the samples.

        se^2 = (g - 1) / g sum_i (FD_i - mean FD)^2,   FD_i without group i of g

    A bootstrap is not used: its duplicates shift the distance, so that its interval need not hold the estimate. The
    error is that of drawing other samples; the reference stays, and so does the bias of a finite N. Groups are rows
    i, i + g, i + 2 g, ... Source: Shao and Wu 1989, "A general theory for jackknife variance estimation"; Busing et
    al. 1999, "Delete-m jackknife for unequal m", of whose groups ours are the equal ones.

    Args:
        samples, reference: [n, d] and [m, d].
        paired: Row i of both belongs together, as an image and its reconstruction do: a group is left out of both.

    Raises:
        ValueError: what `frechet_distance` refuses, fewer than two groups, pairs that are not as many on both sides.
    """
    value, without = frechet_replicates(samples, reference, num_groups=num_groups, paired=paired)
    return value, jackknife_error(without)


def frechet_replicates(
    samples: Tensor, reference: Tensor, *, num_groups: int = NUM_GROUPS, paired: bool = False
) -> tuple[float, Tensor]:
    """The distance of `frechet_interval` and what it is without each group, [g]; of sets that share their images in the
    same rows, the errors of their difference are those of the differences of these."""
    if paired and len(samples) != len(reference):
        raise ValueError(f"{len(samples)} and {len(reference)} features are no pairs.")
    if not 2 <= num_groups <= len(samples) // 2:
        raise ValueError(f"{num_groups} groups of {len(samples)} samples: choose from 2 to {len(samples) // 2}.")
    require_enough(samples, reference)
    mean, covariance = moments(reference)
    value = frechet_of_moments(moments(samples), (mean, covariance))
    root, trace = symmetric_root(covariance), covariance.trace()
    without = torch.empty(num_groups, dtype=torch.float64)
    for group in range(num_groups):
        kept = torch.arange(len(samples)) % num_groups != group
        other_mean, other = moments(samples[kept])
        if paired:
            mean, covariance = moments(reference[kept])
            root, trace = symmetric_root(covariance), covariance.trace()
        # eigenvalues cost a quarter of singular values; what they lose of precision all replicates lose alike
        overlap = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
        without[group] = (other_mean - mean).square().sum() + other.trace() + trace - 2 * overlap
    return value, without


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
) -> list[tuple[float, float]]:
    """Mean and standard error of each value of a metric over disjoint subsets of both sets, all of one size.

    Args:
        metric: (samples, reference) -> values.
        samples, reference: [n, d] and [m, d]; subsets have min(n, m) // num_subsets of each, drawn with the seed.

    Returns:
        (mean, standard error) per value.

    Raises:
        ValueError: fewer than two subsets, or none to put into them.
    """
    size = min(len(samples), len(reference)) // num_subsets if num_subsets > 1 else 0
    if size < 1:
        raise ValueError(f"{len(samples)} and {len(reference)} features for {num_subsets} subsets: two are needed.")
    generator = torch.Generator().manual_seed(seed)
    parts = [
        features[torch.randperm(len(features), generator=generator)[: size * num_subsets]].double().split(size)
        for features in (samples, reference)
    ]
    values = torch.tensor([metric(a, b) for a, b in zip(*parts, strict=True)], dtype=torch.float64)
    errors = values.std(0) / num_subsets**0.5
    return list(zip(values.mean(0).tolist(), errors.tolist(), strict=True))


def class_accuracy(named: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of `named_classes` [n] that are the class that was asked for, [n], and sqrt(p (1 - p) / n)."""
    share = (named == labels).double().mean().item()
    return share, math.sqrt(share * (1 - share) / len(named))


@torch.no_grad()
def named_classes(classifier: Classifier, features: Tensor) -> Tensor:
    """The class that it names by its own features, [n, d] -> [n]."""
    return classifier.head(features.to(classifier.head.weight.device)).argmax(1).cpu()


def class_shift(named: Tensor, reference: Tensor, *, num_groups: int = NUM_GROUPS) -> tuple[float, float]:
    """How far the shares of the classes are from those of a reference: their total variation, and its standard error.

        TV = 1/2 sum_c |p_c - q_c|,   from 0 to 1

    The error is a jackknife's over groups of the samples. Of equal shares TV is above 0 by the noise of counting.

    Args:
        named, reference: Classes, [n] and [m], both as a classifier names them: what it takes for another it takes so
            in both.
    """
    num_classes = int(torch.cat([named, reference]).max()) + 1
    shares = reference.bincount(minlength=num_classes).double() / len(reference)
    group = torch.arange(len(named)) % num_groups
    counts = torch.stack([named[group == i].bincount(minlength=num_classes) for i in range(num_groups)]).double()

    def distance(counted: Tensor) -> Tensor:
        return (counted / counted.sum(-1, keepdim=True) - shares).abs().sum(-1) / 2

    return distance(counts.sum(0)).item(), jackknife_error(distance(counts.sum(0) - counts))
