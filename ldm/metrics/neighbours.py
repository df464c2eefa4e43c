"""Nearest neighbours between sets of features: precision, recall, density, coverage, retrieval.

Setting: features are [n, d], compared by Euclidean distance, retrieval by cosine. Pairs are compared part by part, so
that neither n x m distances nor anything of n x m x d is ever held.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_PAIRS = 2**24
"""Whose distances are held at once."""


def part_size(num_others: int) -> int:
    """How many rows are compared with so many others at a time."""
    return max(1, MOST_PAIRS // num_others)


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
    size = part_size(len(gallery))
    ranks = []
    for part, its_own in zip(queries.split(size), own.split(size), strict=True):
        similarity = part @ gallery.T
        ranks.append((similarity > similarity.gather(1, its_own[:, None])).sum(dim=1))
    return torch.cat(ranks)


def precision_recall(samples: Tensor, reference: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Precision: the share of samples on the ground of the reference. Recall: of the reference on that of the samples.

        precision = mean_j [ |y_j - x_i| <= r_i for any i ],   recall the same with x and y exchanged

    r_i is the distance of x_i to its k-th nearest other one of its set. Both depend on the sizes of the sets: compare
    them at equal sizes only. Source: Kynkäänniemi et al. 2019, arXiv:1904.06991, eqs. 1 and 2, where k = 3.

    Args:
        samples, reference: [m, d] and [n, d], more than k of either.
    """
    return _share_on_ground(samples, reference, k), _share_on_ground(reference, samples, k)


def _share_on_ground(points: Tensor, ground: Tensor, k: int) -> float:
    parts = [(distances <= radii).any(dim=0) for distances, radii in _balls(points.double(), ground.double(), k)]
    return torch.stack(parts).any(dim=0).double().mean().item()


def _balls(points: Tensor, ground: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of the ground at a time: their distances to all points, [b, m], and to their own k-th nearest, [b, 1].

    Both by the same products, so that an equal distance is equal to the last bit.
    """
    radii = nearest_distances(ground, ground, k=k, own=torch.arange(len(ground)))[:, -1:]
    centre, size = ground.mean(dim=0), part_size(len(points))
    ground, points = ground - centre, points - centre  # near the origin less cancels
    for rows, radius in zip(ground.split(size), radii.split(size), strict=True):
        yield squared_distances(rows, points).sqrt(), radius


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 = |a_i|^2 - 2 a_i.b_j + |b_j|^2, [n, m]; what cancels below 0 is 0."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    return torch.addmm(norms, a, b.T, alpha=-2).clamp(min=0)


def nearest_distances(queries: Tensor, gallery: Tensor, *, k: int = 1, own: Tensor | None = None) -> Tensor:
    """Distances of each query to its k nearest in the gallery, ascending, [q, k].

    Args:
        own: Row of the gallery that each query is itself and that does not count, [q]; None: it is none of them.
    """
    centre, size = gallery.mean(dim=0), part_size(len(gallery))
    queries, gallery = queries - centre, gallery - centre
    found = []
    for start in range(0, len(queries), size):
        squared = squared_distances(queries[start : start + size], gallery)
        if own is not None:
            squared.scatter_(1, own[start : start + size, None], torch.inf)
        found.append(squared.topk(k, dim=1, largest=False).values.sqrt())
    return torch.cat(found)


def density_coverage(real: Tensor, fake: Tensor, *, k: int = 5) -> tuple[float, float]:
    """How densely and how widely `fake` lies on the ground of `real`.

        density  = 1 / (k M) sum_j sum_i 1[|y_j - x_i| < r_i]         expected 1 where both are from one distribution
        coverage = 1 / N sum_i 1[min_j |y_j - x_i| < r_i]             expected: `expected_coverage`

    r_i is the distance of the real x_i to its k-th nearest other real one; the inequality is strict, as in the
    authors' code, so an image with k copies covers nothing. Source: Naeem et al. 2020, arXiv:2002.09797, section 3.

    Args:
        real, fake: [N, d] and [M, d], N > k.
    """
    hits = torch.cat([(distances < radii).sum(dim=1) for distances, radii in _balls(fake, real, k)])
    return hits.sum().item() / (k * len(fake)), (hits > 0).float().mean().item()


def expected_coverage(num_real: int, num_fake: int, *, k: int = 5) -> float:
    """Coverage of N real ones by M fakes of the same distribution, 1 - prod_{j=1..k} (N - j) / (N + M - j).

    Source: Naeem et al. 2020, arXiv:2002.09797, section 3, where k = 5 is chosen by it.
    """
    return 1 - math.prod((num_real - j) / (num_real + num_fake - j) for j in range(1, k + 1))
