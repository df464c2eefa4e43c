"""Copies and near copies among images, by difference hashes and thumbnails.

Setting: images are [b, 3, H, W] in [-1, 1]. Pairs are compared part by part, so that memory does not grow with their
number.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ldm.metrics.neighbours import part_size, squared_distances
from ldm.progress import track

LUMA = (0.299, 0.587, 0.114)
LEVEL = 1 / 127.5
"""One of the 255 steps from -1 to 1."""


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
    hashes: Tensor, colours: Tensor, *, max_bits: int, max_levels: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every pair whose hashes differ in few bits and whose thumbnails in few levels, part by part, with a progress bar.

    Args:
        hashes: bool [n, 64].
        colours: Thumbnails, [n, d].
        max_levels: Largest root mean square difference of the thumbnails, in levels of 255.

    Yields:
        Pairs [p, 2] with i < j, bits that differ [p], levels [p].
    """
    signs, size = hashes.float() * 2 - 1, part_size(len(hashes))
    for start in track(range(0, len(hashes), size), "near duplicates"):
        rows = slice(start, start + size)
        bits = (hashes.shape[1] - signs[rows] @ signs[start:].T) / 2  # small whole numbers, which float32 holds exactly
        levels = (squared_distances(colours[rows], colours[start:]) / colours.shape[1]).sqrt() / LEVEL
        found = ((bits <= max_bits) & (levels <= max_levels)).triu(1)
        yield found.nonzero() + start, bits[found].long(), levels[found]


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
