"""Exact and near duplicates among images, found with difference hashes and thumbnails.

Images are [b, 3, H, W] in [-1, 1]. Pairs are compared in chunks, so that memory use does not grow with the number of
pairs.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ldm.metrics.neighbours import chunk_size, squared_distances
from ldm.progress import track

LUMA = (0.299, 0.587, 0.114)
LEVEL = 1 / 127.5
"""One 8-bit intensity level, for values in [-1, 1]."""


def dhash(images: Tensor, *, margin: float = LEVEL) -> Tensor:
    """Return the difference hash, bool [b, 64]: True where a cell of a grey 8 x 9 thumbnail exceeds its left neighbour.

    Unlike in the original hash, the cell must exceed its neighbour by more than `margin`. In flat regions, such as the
    background of a drawing, compression noise alone determines the sign of the difference.
    Source: N. Krawetz, "Kind of Like That", 2013, hackerfactor.com.
    """
    grey = (images * images.new_tensor(LUMA)[:, None, None]).sum(dim=1, keepdim=True)
    cells = F.interpolate(grey, size=(8, 9), mode="bilinear", antialias=True, align_corners=False)[:, 0]
    return (cells[..., 1:] - cells[..., :-1] > margin).flatten(1)


def thumbnails(images: Tensor) -> Tensor:
    """Return the colours of 8 x 8 cells, [b, 192] in [-1, 1].

    The colours distinguish images with equal hashes, such as flags.
    """
    return F.interpolate(images, size=8, mode="bilinear", antialias=True, align_corners=False).flatten(1)


def near_duplicate_pairs(
    hashes: Tensor, colours: Tensor, *, max_bits: int, max_levels: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Find all pairs of images with similar hashes and thumbnails, chunk by chunk, with a progress bar.

    Args:
        hashes: Difference hashes, bool [n, 64].
        colours: Thumbnails, [n, d].
        max_bits: Maximum number of differing hash bits.
        max_levels: Maximum root mean square difference between thumbnails, in 8-bit levels.

    Yields:
        For each chunk: pairs [p, 2] with i < j, the number of differing hash bits of each pair [p], and the difference
        between its thumbnails in levels [p].
    """
    signs, size = hashes.float() * 2 - 1, chunk_size(len(hashes))
    for start in track(range(0, len(hashes), size), "near duplicates"):
        rows = slice(start, start + size)
        bits = (hashes.shape[1] - signs[rows] @ signs[start:].T) / 2  # small integers, exact in float32
        levels = (squared_distances(colours[rows], colours[start:]) / colours.shape[1]).sqrt() / LEVEL
        matches = ((bits <= max_bits) & (levels <= max_levels)).triu(1)
        yield matches.nonzero() + start, bits[matches].long(), levels[matches]


class DuplicateIndex:
    """Exact and near duplicates of each image, tracked separately for the training (0) and validation (1) splits.

    Args:
        digests: Digest of each image's pixels; equal for images with identical pixels.
        train, val: Indices of the images of each split.
    """

    def __init__(self, digests: Sequence[bytes], train: np.ndarray, val: np.ndarray) -> None:
        first_by_digest: dict[bytes, int] = {}
        self.first_copy = np.array([first_by_digest.setdefault(d, i) for i, d in enumerate(digests)], dtype=np.int64)
        """Index of the first image with the same pixels, [n]."""
        self.distinct_indices = np.unique(self.first_copy)
        """Indices of the first copies, one for each distinct image."""
        self.is_val = np.isin(np.arange(len(digests)), val)
        self.representative = np.full((2, len(digests)), -1)
        """Index of the first image in each split with the same pixels as distinct image i, or -1 if none, [2, n]."""
        for split, indices in enumerate((train, val)):
            self.representative[split, self.first_copy[indices[::-1]]] = indices[::-1]
        self.has_near_duplicate = np.zeros((2, len(digests)), dtype=bool)
        """True if the split contains a near duplicate of distinct image i that is not an exact copy, [2, n]."""
        self.num_pairs = 0
        self._closest = np.empty((0, 5))

    def add(self, pairs: Tensor, bits: Tensor, levels: Tensor, *, max_stored: int) -> None:
        """Add near-duplicate pairs, given as rows of `distinct_indices`.

        Only the `max_stored` closest pairs are stored. Pairs that span both splits take precedence.
        """
        i, j = self.distinct_indices[pairs.numpy()].T
        for a, b in ((i, j), (j, i)):
            for split in (0, 1):
                self.has_near_duplicate[split, a[self.representative[split, b] >= 0]] = True
        present = self.representative >= 0
        spans_splits = (present[0, i] & present[1, j]) | (present[1, i] & present[0, j])
        self._closest = np.concatenate([self._closest, np.column_stack([~spans_splits, bits, levels, i, j])])
        self._closest = self._closest[np.lexsort(self._closest[:, 2::-1].T)][:max_stored]
        self.num_pairs += len(pairs)

    def closest_pairs(self) -> list[tuple[int, int, int, float]]:
        """Return both images, the number of differing bits, and the difference in levels of each of the closest pairs.

        In a pair that spans both splits, the validation image comes first.
        """
        return [
            (*self._order_by_split(int(i), int(j)), int(bits), levels)
            for _, bits, levels, i, j in self._closest.tolist()
        ]

    def copy_groups(self) -> list[list[int]]:
        """Return groups of identical images. Groups in both splits come first and start with a validation image."""
        order = np.argsort(self.first_copy, kind="stable")
        copies = np.split(order, np.flatnonzero(np.diff(self.first_copy[order])) + 1)
        groups = [sorted(group.tolist(), key=lambda i: not self.is_val[i]) for group in copies if len(group) > 1]
        return sorted(groups, key=lambda group: self.is_val[group[0]] <= self.is_val[group[-1]])

    def _order_by_split(self, i: int, j: int) -> tuple[int, int]:
        (train_i, val_i), (train_j, val_j) = self.representative[:, [i, j]].T.tolist()
        if val_i >= 0 and train_j >= 0:
            return val_i, train_j
        return (val_j, train_i) if val_j >= 0 and train_i >= 0 else (i, j)
