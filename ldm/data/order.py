"""The order of training samples, as a pure function of seed and step.

Every epoch is a permutation of its own; batches run on over its end. Nothing is remembered, so training that
continues at step k sees what it would have seen, whatever the workers and restarts before it.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch.utils.data import Sampler


def derive_seed(*parts: int) -> int:
    """One 63-bit seed from several integers (SplitMix64's finaliser), for a generator of its own."""
    mask, state = 2**64 - 1, 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    return torch.randperm(size, generator=generator).tolist()


def batch_at(step: int, *, size: int, batch_size: int, seed: int) -> list[int]:
    """Positions (0..size-1) of the samples that batch `step` (from 0) holds."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [_permutation(size, seed, position // size)[position % size] for position in positions]


class StepBatches(Sampler[list[int]]):
    """An endless batch sampler that starts at any step; ranks take interleaved parts of one global batch.

    Args:
        size: Number of training samples.
        batch_size: Samples per batch over all ranks.
        start: First batch to give: optimizer steps done, times the batches that each accumulates.

    Raises:
        ValueError: batch_size does not divide by the number of ranks.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, num_ranks: int = 1
    ) -> None:
        if batch_size % num_ranks:
            raise ValueError(f"batch_size={batch_size} must be a multiple of the {num_ranks} processes.")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.start, self.rank, self.num_ranks = start, rank, num_ranks

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start
        while True:
            batch = batch_at(step, size=self.size, batch_size=self.batch_size, seed=self.seed)
            yield batch[self.rank :: self.num_ranks]
            step += 1
