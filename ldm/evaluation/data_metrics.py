"""Numbers of a data set: copies and near copies, balance, captions, and how one set of features covers another.

Setting: images are [b, 3, H, W] in [-1, 1]; features are [n, d], compared by Euclidean distance. Whatever looks at
pairs goes block by block, so that memory does not grow with their number.
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
LEVEL = 1 / 127.5
"""One of the 255 steps from -1 to 1."""
HASH_BITS = 64
BLOCK = 1024


def dhash(images: Tensor, *, margin: float = LEVEL) -> Tensor:
    """Difference hash, bool [b, 64]: is a cell of the grey 8 x 9 thumbnail brighter than its left neighbour?

    By more than `margin`, unlike the original: on flat ground, as around drawings, the sign of a difference is that
    of the noise of the compression. Source: N. Krawetz, "Kind of Like That", 2013, hackerfactor.com.
    """
    grey = (images * images.new_tensor(LUMA)[:, None, None]).sum(dim=1, keepdim=True)
    cells = F.interpolate(grey, size=(8, 9), mode="bilinear", antialias=True, align_corners=False)[:, 0]
    return (cells[..., 1:] - cells[..., :-1] > margin).flatten(1)


def thumbnails(images: Tensor) -> Tensor:
    """The colours of 8 x 8 cells, [b, 192] in [-1, 1]: they tell apart what has the same hash, such as flags."""
    return F.interpolate(images, size=8, mode="bilinear", antialias=True, align_corners=False).flatten(1)


def near_pairs(
    hashes: Tensor, colours: Tensor, *, max_bits: int, max_levels: float, block: int = BLOCK
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every pair whose hashes differ in few bits and whose thumbnails in few levels, one answer per pair of blocks.

    Args:
        hashes: bool [n, 64].
        colours: Thumbnails, [n, d].
        max_levels: Largest root mean square difference of the thumbnails, in levels of 255.

    Yields:
        Pairs [p, 2] with i < j, bits that differ [p], levels [p]; `num_block_pairs` times, p = 0 among them.
    """
    signs = hashes.float() * 2 - 1
    for rows in range(0, len(hashes), block):
        for columns in range(rows, len(hashes), block):
            i, j = slice(rows, rows + block), slice(columns, columns + block)
            bits = (hashes.shape[1] - signs[i] @ signs[j].T) / 2  # small whole numbers, which float32 holds exactly
            levels = (squared_distances(colours[i], colours[j]) / colours.shape[1]).sqrt() / LEVEL
            found = (bits <= max_bits) & (levels <= max_levels)
            if rows == columns:
                found = found.triu(1)
            pairs = found.nonzero()
            yield pairs + torch.tensor([rows, columns]), bits[found].long(), levels[found]


def num_block_pairs(n: int, block: int = BLOCK) -> int:
    """How many answers `near_pairs` gives for n images."""
    blocks = math.ceil(n / block)
    return blocks * (blocks + 1) // 2


class Copies:
    """Who has the pixels of whom, and who is near to whom, with training (0) and validation (1) kept apart.

    Args:
        digests: Of the pixels of each image; equal where every pixel is.
    """

    def __init__(self, digests: Sequence[bytes], train: np.ndarray, val: np.ndarray) -> None:
        seen: dict[bytes, int] = {}
        self.first = np.array([seen.setdefault(digest, i) for i, digest in enumerate(digests)], dtype=np.int64)
        """The first image with the same pixels, [n]."""
        self.distinct = np.unique(self.first)
        self.is_val = np.isin(np.arange(len(digests)), val)
        self.member = np.full((2, len(digests)), -1)
        """By split, the first image with the pixels of `first`'s i; -1: none."""
        for split, indices in enumerate((train, val)):
            self.member[split, self.first[indices[::-1]]] = indices[::-1]
        self.is_near = np.zeros((2, len(digests)), dtype=bool)
        """By split, whether it holds a near duplicate, other than a copy, of `first`'s i."""
        self.num_pairs = 0
        self._closest = np.empty((0, 5))

    def add(self, pairs: Tensor, bits: Tensor, levels: Tensor, *, keep: int) -> None:
        """Take in near pairs of rows of `distinct`, and keep so many of the closest, those across the splits first."""
        i, j = self.distinct[pairs.numpy()].T
        for a, b in ((i, j), (j, i)):
            for split in (0, 1):
                self.is_near[split, a[self.member[split, b] >= 0]] = True
        has = self.member >= 0
        crosses = (has[0, i] & has[1, j]) | (has[1, i] & has[0, j])
        self._closest = np.concatenate([self._closest, np.column_stack([~crosses, bits, levels, i, j])])
        self._closest = self._closest[np.lexsort(self._closest[:, 2::-1].T)][:keep]
        self.num_pairs += len(pairs)

    def near(self) -> list[tuple[int, int, int, float]]:
        """Images, bits and levels of the closest pairs; across the splits the validation image comes first."""
        return [(*self._across(int(i), int(j)), int(bits), levels) for _, bits, levels, i, j in self._closest.tolist()]

    def groups(self) -> list[list[int]]:
        """Images of equal pixels, those across the splits first and with a validation image in front."""
        order = np.argsort(self.first, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(self.first[order])) + 1)
        found = [sorted(part.tolist(), key=lambda i: not self.is_val[i]) for part in parts if len(part) > 1]
        return sorted(found, key=lambda part: self.is_val[part[0]] <= self.is_val[part[-1]])

    def _across(self, i: int, j: int) -> tuple[int, int]:
        (train_i, val_i), (train_j, val_j) = self.member[:, i].tolist(), self.member[:, j].tolist()
        if val_i >= 0 and train_j >= 0:
            return val_i, train_j
        return (val_j, train_i) if val_j >= 0 and train_i >= 0 else (i, j)


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
        raise ValueError(f"k={k} must be at least 1 and at most {others}, the number of others.")
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
        raise ValueError(f"k={k} must be at least 1 and below the {len(real)} real ones.")
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


def vendi_score(features: Tensor) -> float:
    """How many different images there are in effect, from 1 to n: exp(-sum_i l_i log l_i).

    l_i are the eigenvalues of K / n with the cosine similarity K. Those of the d x d matrix X^T X / n are the same
    but for zeros, so the cost is linear in n. Source: Friedman and Dieng 2022, arXiv:2210.02410.
    """
    n, d = features.shape
    if n <= d:
        unit = F.normalize(features.double(), dim=1)
        kernel = unit @ unit.T
    else:
        units = (F.normalize(part, dim=1) for part in features.split(BLOCK))
        kernel = torch.zeros(d, d, dtype=torch.float64)
        for unit in units:
            kernel += (unit.T @ unit).double()
    shares = torch.linalg.eigvalsh(kernel / n).clamp(min=0)
    return math.exp(torch.special.entr(shares).sum().item())


def class_balance(labels: Sequence[int | None], class_names: Sequence[str] | None) -> dict[str, Any]:
    """Images per class, most first; their entropy, and how many equal classes would have it."""
    counted = Counter(label for label in labels if label is not None)
    names = class_names or {label: str(label) for label in counted}
    counts = {names[label]: counted[label] for label in (range(len(names)) if class_names else sorted(counted))}
    shares = np.array([count for count in counts.values() if count]) / counted.total()
    entropy_bits = float(-(shares * np.log2(shares)).sum()) + 0.0  # of one class 0, not -0
    return {
        "num_classes": len(counts),
        "entropy_bits": entropy_bits,
        "effective_classes": 2**entropy_bits,
        "num_missing": sum(label is None for label in labels),
        "counts": dict(sorted(counts.items(), key=lambda item: -item[1])),
    }


def caption_statistics(captions: Sequence[str | None], most: int = 20) -> dict[str, Any]:
    """How many captions there are, how many of them differ, how long they are, and what they say most often.

    Args:
        captions: Of all images, those of one image after each other; None for an image without any.
    """
    given = [caption for caption in captions if caption is not None and caption.strip()]
    words = [re.findall(r"\w+(?:['’]\w+)*", caption.lower()) for caption in given]
    lengths = [len(found) for found in words] or [0]
    return {
        "num_captions": len(given),
        "num_missing": sum(caption is None or not caption.strip() for caption in captions),
        "num_distinct": len(set(given)),
        "fewest_words": min(lengths),
        "median_words": statistics.median(lengths),
        "most_words": max(lengths),
        "lengths": dict(sorted(Counter(map(len, words)).items())),
        "most_frequent": dict(Counter(given).most_common(most)),
        "most_frequent_words": dict(Counter(word for found in words for word in found).most_common(most)),
    }
