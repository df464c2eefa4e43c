"""Whole batches from memory-mapped arrays, in the stateless order."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ldm.data.order import StepBatches
from ldm.runtime.signals import leave_to_parent

Fetch = Callable[..., Any]
"""(indices, epochs) -> a batch; without epochs, what validation sees."""


class Batches(Dataset):
    """`fetch(indices)` as a data set: one call per batch, no per-sample collation."""

    def __init__(self, fetch: Fetch, indices: np.ndarray) -> None:
        self.fetch, self.indices = fetch, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, positions: Sequence[int]) -> Any:
        return self.fetch(self.indices[list(positions)])


class Visits(Batches):
    """`fetch(indices, epochs)`: a sample may be another one in another epoch, as an image with several captions is."""

    def __getitems__(self, visits: Sequence[tuple[int, int]]) -> Any:  # type: ignore[override]
        epochs, positions = np.array(visits, dtype=np.int64).T
        return self.fetch(self.indices[positions], epochs)


def _whole(batch: Any) -> Any:
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
    """One rank's micro-batches of endless optimizer steps of `batch_size` samples, from step `start` on."""
    order = StepBatches(len(indices), batch_size, seed, start, accumulate, rank, num_ranks)
    return DataLoader(
        Visits(fetch, indices),
        batch_sampler=order,
        collate_fn=_whole,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=leave_to_parent,
        generator=torch.Generator(),  # iterating draws from it, and not from the generator that training draws from
    )


def val_loader(fetch: Fetch, indices: np.ndarray, *, batch_size: int) -> DataLoader:
    """All of `indices` once, in order."""
    return DataLoader(
        Batches(fetch, indices), batch_size=batch_size, shuffle=False, collate_fn=_whole, generator=torch.Generator()
    )
