"""Caption embeddings as data: computed once by a frozen text encoder, memory-mapped ever after."""

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
    """The embeddings of each image's captions, memory-mapped.

    Args:
        counts: How many captions each image has, [N]; those of one image are rows after each other. None: one each.
    """

    def __init__(self, folder: Path, counts: np.ndarray | None = None) -> None:
        self.arrays = {path.stem: read_array(path) for path in sorted(folder.glob("*.npy"))}
        self.counts = counts
        self._first = None if counts is None else np.concatenate([[0], counts.cumsum()[:-1]])

    def batch(self, indices: Any, draws: np.ndarray | None = None) -> dict[str, Tensor]:
        """A condition for these images, by their first captions.

        Args:
            draws: A number from [0, 1) for each of them, [b], which chooses among its captions instead.
        """
        rows = np.asarray(indices)
        if self.counts is not None and self._first is not None:
            chosen = 0 if draws is None else (draws * self.counts[rows]).astype(np.int64)
            rows = self._first[rows] + chosen
        return {name: torch.from_numpy(np.array(array[rows])) for name, array in self.arrays.items()}


def open_captions(
    encode: Callable[[Sequence[str]], dict[str, Tensor]],
    captions: Sequence[str | Sequence[str]],
    encoder: dict[str, Any],
    *,
    cache_dir: Path | str | None = None,
    batch_size: int = 256,
) -> CaptionData:
    """Open the embeddings of these captions, computing them where they do not exist yet.

    Args:
        encode: captions -> batch-first tensors by name; row i depends on caption i alone.
        captions: Of each image, one or several.
        encoder: Plain values that identify the encoder; they key the cache together with the captions.
    """
    several = [[one] if isinstance(one, str) else list(one) for one in captions]
    counts = np.array([len(of_image) for of_image in several], dtype=np.int64)
    texts = [text for of_image in several for text in of_image]
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
            part = encode(captions[start : start + batch_size])
            for name, value in part.items():
                if name not in arrays:
                    shape, dtype = (len(captions), *value.shape[1:]), value.numpy().dtype
                    arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
                arrays[name][start : start + len(value)] = value.numpy()
            bar.advance(task, len(captions[start : start + batch_size]))
    for array in arrays.values():
        array.flush()
