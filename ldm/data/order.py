"""Order of the training samples, as a pure function of the seed and the step.

The batch of step k is divided over all ranks and micro-batches. Its samples depend only on (seed, k), with a new
permutation in each epoch. The random numbers for a row of the batch depend only on (seed, k, row). The order has no
state, so a run resumed at step k sees the same data even with a different number of workers, ranks or micro-batches.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ldm.errors import UserError
from ldm.runtime.random import torch_generator

SAMPLE_STREAM = 2
"""Seed component of per-sample draws, such as the choice of a caption, to keep them independent of all other draws."""


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    generator = torch_generator(seed, epoch)
    return torch.randperm(size, generator=generator).tolist()


def visits_at(step: int, *, size: int, batch_size: int, seed: int) -> list[tuple[int, int]]:
    """Return the (epoch, position) pairs of batch `step` (from 0), where positions are 0..size-1."""
    visits = range(step * batch_size, (step + 1) * batch_size)
    return [(visit // size, _permutation(size, seed, visit // size)[visit % size]) for visit in visits]


def batch_at(step: int, *, size: int, batch_size: int, seed: int) -> list[int]:
    """Return the positions (0..size-1) of the samples in batch `step` (from 0)."""
    return [position for _, position in visits_at(step, size=size, batch_size=batch_size, seed=seed)]


@lru_cache(maxsize=2)
def epoch_draws(size: int, seed: int, epoch: int) -> Tensor:
    """Draw one number in [0, 1) per sample, float32 [size], for choices made once per epoch, such as the caption."""
    return torch.rand(size, generator=torch_generator(seed, epoch, 0, SAMPLE_STREAM))


def micro_batch_rows(micro_batch: int, rank: int, num_ranks: int, count: int) -> range:
    """Return the `count` rows of a step's batch that form micro-batch `micro_batch` (from 0) on this rank."""
    start = (micro_batch * num_ranks + rank) * count
    return range(start, start + count)


class StepBatches(Sampler[list[tuple[int, int]]]):
    """Infinite sampler of one rank's micro-batches of (epoch, position) pairs, starting at any step.

    Args:
        size: Number of training samples.
        batch_size: Samples per optimizer step, over all micro-batches and ranks.
        start: First optimizer step.
        accumulate: Micro-batches per step.

    Raises:
        UserError: `batch_size` is not a multiple of `accumulate * num_ranks`.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        start: int = 0,
        accumulate: int = 1,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if batch_size % (accumulate * num_ranks):
            raise UserError(
                f"batch_size={batch_size} must be a multiple of {accumulate * num_ranks}, which is the number of "
                f"processes ({num_ranks}) times trainer.accumulate_grad_batches={accumulate}."
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.start, self.accumulate, self.rank, self.num_ranks = start, accumulate, rank, num_ranks

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step, count = self.start, self.batch_size // (self.accumulate * self.num_ranks)
        while True:
            batch = visits_at(step, size=self.size, batch_size=self.batch_size, seed=self.seed)
            for micro_batch in range(self.accumulate):
                rows = micro_batch_rows(micro_batch, self.rank, self.num_ranks, count)
                yield batch[rows.start : rows.stop]
            step += 1
