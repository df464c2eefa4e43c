"""Nearest-neighbour metrics of features: precision, recall, density, coverage and retrieval.

Features are [n, d]. Distances are Euclidean, except for retrieval, which uses cosine similarity. Pairs are processed in
chunks, so that the n x m matrix of distances is never held in memory.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_PAIRS = 2**24
"""Maximum number of pairwise distances held in memory at once."""


def chunk_size(num_columns: int) -> int:
    """Return how many rows of a distance matrix with `num_columns` columns to compute at once."""
    return max(1, MAX_PAIRS // num_columns)


def retrieval_ranks(queries: Tensor, gallery: Tensor, targets: Tensor) -> Tensor:
    """Return the number of gallery images that are more similar to each query than the query's target.

    Rank 0 is a top-1 hit.

    Args:
        queries: Features of generated images, [q, d].
        gallery: Features of the training images, [n, d].
        targets: Gallery row of each query's target, [q].

    Returns:
        Ranks by cosine similarity, [q].
    """
    queries, gallery = (F.normalize(features, dim=-1) for features in (queries, gallery))
    size = chunk_size(len(gallery))
    ranks = []
    for rows, columns in zip(queries.split(size), targets.split(size), strict=True):
        similarity = rows @ gallery.T
        ranks.append((similarity > similarity.gather(1, columns[:, None])).sum(dim=1))
    return torch.cat(ranks)


def precision_recall(samples: Tensor, reference: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Return the precision and recall of samples y with respect to reference features x.

    Precision is the fraction of samples that lie on the manifold of the reference features. Recall is the fraction of
    reference features that lie on the manifold of the samples.

        precision = mean_j [ |y_j - x_i| <= r_i for any i ],   recall = the same with x and y exchanged

    r_i is the distance from x_i to its k-th nearest neighbour within its own set. Both metrics depend on the sizes of
    the sets, so compare values only for sets of equal sizes.
    Source: Kynkäänniemi et al. 2019, arXiv:1904.06991, eqs. 1 and 2, where k = 3.

    Args:
        samples, reference: Features [m, d] and [n, d], where m > k and n > k.
    """
    return _fraction_on_manifold(samples, reference, k), _fraction_on_manifold(reference, samples, k)


def _fraction_on_manifold(points: Tensor, manifold: Tensor, k: int) -> float:
    chunks = [(distances <= radii).any(dim=0) for distances, radii in _balls(points.double(), manifold.double(), k)]
    return torch.stack(chunks).any(dim=0).double().mean().item()


def _balls(points: Tensor, manifold: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield balls around the features of the manifold in chunks, as distances to all points [b, m] and radii [b, 1].

    A radius is the distance to the k-th nearest neighbour. Distances and radii are computed with the same matrix
    products, so that equal distances are bit-identical.
    """
    radii = nearest_distances(manifold, manifold, k=k, self_rows=torch.arange(len(manifold)))[:, -1:]
    centre, size = manifold.mean(dim=0), chunk_size(len(points))
    manifold, points = manifold - centre, points - centre  # centring reduces cancellation
    for rows, radius in zip(manifold.split(size), radii.split(size), strict=True):
        yield squared_distances(rows, points).sqrt(), radius


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return |a_i - b_j|^2 = |a_i|^2 - 2 a_i.b_j + |b_j|^2, [n, m]. Values below 0 due to rounding are set to 0."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    return torch.addmm(norms, a, b.T, alpha=-2).clamp(min=0)


def nearest_distances(queries: Tensor, gallery: Tensor, *, k: int = 1, self_rows: Tensor | None = None) -> Tensor:
    """Return the distances from each query to its k nearest neighbours in the gallery in ascending order, [q, k].

    Args:
        self_rows: Index of each query's own row in the gallery, [q]. That row is excluded from the query's neighbours.
            None if no query is in the gallery.
    """
    centre, size = gallery.mean(dim=0), chunk_size(len(gallery))
    queries, gallery = queries - centre, gallery - centre
    distances = []
    for start in range(0, len(queries), size):
        squared = squared_distances(queries[start : start + size], gallery)
        if self_rows is not None:
            squared.scatter_(1, self_rows[start : start + size, None], torch.inf)
        distances.append(squared.topk(k, dim=1, largest=False).values.sqrt())
    return torch.cat(distances)


def density_coverage(real: Tensor, fake: Tensor, *, k: int = 5) -> tuple[float, float]:
    """Return the density and coverage of fake features y with respect to real features x.

        density  = 1 / (k M) sum_j sum_i 1[|y_j - x_i| < r_i]
        coverage = 1 / N sum_i 1[min_j |y_j - x_i| < r_i]

    r_i is the distance from x_i to its k-th nearest real neighbour. The inequality is strict, as in the authors' code,
    so an image with k copies has an empty ball. If both sets come from the same distribution, the expected density is
    1, and `expected_coverage` returns the expected coverage. Source: Naeem et al. 2020, arXiv:2002.09797, section 3.

    Args:
        real, fake: Features [N, d] and [M, d], where N > k.
    """
    hits = torch.cat([(distances < radii).sum(dim=1) for distances, radii in _balls(fake, real, k)])
    return hits.sum().item() / (k * len(fake)), (hits > 0).float().mean().item()


def expected_coverage(num_real: int, num_fake: int, *, k: int = 5) -> float:
    """Return the expected coverage of N real and M fake features from the same distribution.

        1 - prod_{j=1..k} (N - j) / (N + M - j)

    Source: Naeem et al. 2020, arXiv:2002.09797, section 3, which bases the choice of k = 5 on this value.
    """
    return 1 - math.prod((num_real - j) / (num_real + num_fake - j) for j in range(1, k + 1))
