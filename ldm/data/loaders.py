"""Data loaders that fetch whole batches from memory-mapped arrays, in an order determined by the seed and the step."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ldm.data.order import StepBatches
from ldm.runtime.signals import ignore_in_worker

Fetch = Callable[..., Any]
"""(indices, epochs) -> training batch, or (indices) -> validation batch."""


class Batches(Dataset):
    """Dataset that calls `fetch(indices)` once per batch, without per-sample collation."""

    def __init__(self, fetch: Fetch, indices: np.ndarray) -> None:
        self.fetch, self.indices = fetch, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, positions: Sequence[int]) -> Any:
        return self.fetch(self.indices[list(positions)])


class Visits(Batches):
    """Dataset that calls `fetch(indices, epochs)` once per batch.

    A sample can differ between epochs, for example when an image has several captions.
    """

    def __getitems__(self, visits: Sequence[tuple[int, int]]) -> Any:  # type: ignore[override]
        epochs, positions = np.array(visits, dtype=np.int64).T
        return self.fetch(self.indices[positions], epochs)


def _keep_batch(batch: Any) -> Any:
    return batch


def train_loader(
    fetch: Fetch,
    indices: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    accumulate: int = 1,
    rank: int = 0,
    num_ranks: int = 1,
    num_workers: int = 0,
) -> DataLoader:
    """Return an infinite loader of one rank's micro-batches, starting at optimizer step `start`.

    Each optimizer step uses `batch_size` samples in total over all ranks and micro-batches.
    """
    order = StepBatches(len(indices), batch_size, seed, start, accumulate, rank, num_ranks)
    return DataLoader(
        Visits(fetch, indices),
        batch_sampler=order,
        collate_fn=_keep_batch,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_in_worker,
        generator=torch.Generator(),  # otherwise iterating would advance the global generator used in training
    )


def val_loader(fetch: Fetch, indices: np.ndarray, *, batch_size: int) -> DataLoader:
    """Return a loader that reads all `indices` once, in order."""
    dataset = Batches(fetch, indices)
    generator = torch.Generator()
    return DataLoader(dataset, batch_size=batch_size, shuffle=False, collate_fn=_keep_batch, generator=generator)
