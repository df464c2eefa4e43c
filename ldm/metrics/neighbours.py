"""Nearest neighbours between sets of features: precision, recall, density, coverage, retrieval.

Setting: features are [n, d], compared by Euclidean distance, retrieval by cosine. Pairs are compared block by block, so
that nothing of n x m x d is ever made.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 1024
MOST_SIMILARITIES = 2**24
"""That are held at once."""


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
        raise ValueError(f"k must be at least 1 and below {len(ground)}, the size of either set; it is {k}.")
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


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 = |a_i|^2 - 2 a_i.b_j + |b_j|^2, [n, m]; what cancels below 0 is 0."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    return torch.addmm(norms, a, b.T, alpha=-2).clamp(min=0)


def nearest_distances(queries: Tensor, gallery: Tensor, *, k: int = 1, own: Tensor | None = None) -> Tensor:
    """Distances of each query to its k nearest in the gallery, ascending, [q, k].

    Args:
        own: Row of the gallery that each query is itself and that does not count, [q]; None: it is none of them.

    Raises:
        ValueError: the gallery holds fewer than k others.
    """
    others = len(gallery) - (own is not None)
    if not 1 <= k <= others:
        raise ValueError(f"k must be at least 1 and at most {others}, the number of others; it is {k}.")
    centre = gallery.mean(dim=0)  # near the origin less cancels
    found = []
    for start in range(0, len(queries), BLOCK):
        rows = queries[start : start + BLOCK] - centre
        best = rows.new_full((len(rows), k), torch.inf)
        for first in range(0, len(gallery), 8 * BLOCK):
            columns = gallery[first : first + 8 * BLOCK] - centre
            squared = squared_distances(rows, columns)
            if own is not None:
                is_own = own[start : start + BLOCK, None] == torch.arange(first, first + len(columns))
                squared.masked_fill_(is_own, torch.inf)
            best = torch.cat([best, squared], dim=1).topk(k, dim=1, largest=False).values
        found.append(best.sqrt())
    return torch.cat(found)


def density_coverage(real: Tensor, fake: Tensor, *, k: int = 5) -> tuple[float, float]:
    """How densely and how widely `fake` lies on the ground of `real`.

        density  = 1 / (k M) sum_j sum_i 1[|y_j - x_i| < r_i]         expected 1 where both are from one distribution
        coverage = 1 / N sum_i 1[min_j |y_j - x_i| < r_i]             expected: `expected_coverage`

    r_i is the distance of the real x_i to its k-th nearest other real one; the inequality is strict, as in the
    authors' code, so an image with k copies covers nothing. Source: Naeem et al. 2020, arXiv:2002.09797, section 3.

    Args:
        real, fake: [N, d] and [M, d].

    Raises:
        ValueError: unless 1 <= k < N and M >= 1.
    """
    if not 1 <= k < len(real):
        raise ValueError(f"k must be at least 1 and below {len(real)}, the number of real ones; it is {k}.")
    if not len(fake):
        raise ValueError("there must be at least one fake to look for.")
    radii = nearest_distances(real, real, k=k, own=torch.arange(len(real)))[:, -1:]
    centre, hits = real.mean(dim=0), torch.zeros(len(real), dtype=torch.long)
    # The same products as of the radii, in blocks of the same size: an equal distance is equal to the last bit.
    for start in range(0, len(real), BLOCK):
        rows = slice(start, start + BLOCK)
        for columns in fake.split(8 * BLOCK):
            distances = squared_distances(real[rows] - centre, columns - centre).sqrt()
            hits[rows] += (distances < radii[rows]).sum(dim=1)
    return hits.sum().item() / (k * len(fake)), (hits > 0).float().mean().item()


def expected_coverage(num_real: int, num_fake: int, *, k: int = 5) -> float:
    """Coverage of N real ones by M fakes of the same distribution, 1 - prod_{j=1..k} (N - j) / (N + M - j).

    Source: Naeem et al. 2020, arXiv:2002.09797, section 3, where k = 5 is chosen by it.
    """
    return 1 - math.prod((num_real - j) / (num_real + num_fake - j) for j in range(1, k + 1))
