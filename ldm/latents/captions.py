"""Cache of caption embeddings, which are computed once by a frozen text encoder and then memory-mapped."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.images import default_cache_dir
from ldm.files.atomic import atomic_folder
from ldm.files.digest import sha256_of_values
from ldm.files.lock import cache_lock
from ldm.files.untrusted import read_array
from ldm.progress import progress


class CaptionData:
    """Memory-mapped caption embeddings for a set of images.

    Args:
        counts: Number of captions per image, [N]. The captions of one image are stored in consecutive rows. If None,
            every image has exactly one caption.
    """

    def __init__(self, folder: Path, counts: np.ndarray | None = None) -> None:
        self.arrays = {path.stem: read_array(path) for path in sorted(folder.glob("*.npy"))}
        self.counts = counts
        self._first_rows = None if counts is None else np.concatenate([[0], counts.cumsum()[:-1]])

    def batch(self, indices: Any, draws: np.ndarray | None = None) -> dict[str, Tensor]:
        """Return the condition for these images. If `draws` is None, use the first caption of each image.

        Args:
            draws: One uniform random number in [0, 1) per image, [b], which selects one of that image's captions.
        """
        rows = np.asarray(indices)
        if self.counts is not None and self._first_rows is not None:
            caption = 0 if draws is None else (draws * self.counts[rows]).astype(np.int64)
            rows = self._first_rows[rows] + caption
        return {name: torch.from_numpy(np.array(array[rows])) for name, array in self.arrays.items()}


def open_captions(
    encode: Callable[[Sequence[str]], dict[str, Tensor]],
    captions: Sequence[str | Sequence[str]],
    encoder: dict[str, Any],
    *,
    cache_dir: Path | str | None = None,
    batch_size: int = 256,
) -> CaptionData:
    """Open the cached embeddings of these captions. On a cache miss, compute them first.

    Args:
        encode: Maps captions to a dictionary of batch-first tensors. Row i must depend only on caption i.
        captions: One caption or a list of captions for each image.
        encoder: Plain values that identify the encoder. The cache key is a digest of these values and the captions.
    """
    caption_lists = [[entry] if isinstance(entry, str) else list(entry) for entry in captions]
    counts = np.array([len(caption_list) for caption_list in caption_lists], dtype=np.int64)
    texts = [text for caption_list in caption_lists for text in caption_list]
    key = sha256_of_values([encoder, texts])[:12]
    folder = Path(cache_dir or default_cache_dir()).expanduser() / f"captions-{key}"
    if not folder.is_dir():
        with cache_lock(folder):
            if not folder.is_dir():
                with atomic_folder(folder) as partial:
                    _embed(partial, encode, texts, batch_size)
    return CaptionData(folder, None if (counts == 1).all() else counts)


def _embed(
    folder: Path, encode: Callable[[Sequence[str]], dict[str, Tensor]], captions: Sequence[str], batch_size: int
) -> None:
    arrays: dict[str, np.memmap] = {}
    with progress() as bar:
        task = bar.add_task("embedding captions", total=len(captions))
        for start in range(0, len(captions), batch_size):
            embeddings = encode(captions[start : start + batch_size])
            for name, value in embeddings.items():
                if name not in arrays:
                    shape, dtype = (len(captions), *value.shape[1:]), value.numpy().dtype
                    arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
                arrays[name][start : start + len(value)] = value.numpy()
            bar.advance(task, len(captions[start : start + batch_size]))
    for array in arrays.values():
        array.flush()
