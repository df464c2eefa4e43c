"""What an optimizer step sees, samples and noise, as a pure function of seed and step.

Step k has one batch of rows over all ranks and micro-batches. Its samples follow from (seed, k), each epoch a
permutation of its own; its random numbers from (seed, k, row). Nothing is remembered, so training that continues at
step k, with other workers, ranks or micro-batches, sees what it would have seen.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ldm.errors import UserError
from ldm.runtime.random import torch_generator

OF_SAMPLES = 2
"""Sets the draws of samples, such as which of its captions, apart from the order and from those of rows."""


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    generator = torch_generator(seed, epoch)
    return torch.randperm(size, generator=generator).tolist()


def visits_at(step: int, *, size: int, batch_size: int, seed: int) -> list[tuple[int, int]]:
    """Epoch and position (0..size-1) of each sample that batch `step` (from 0) holds."""
    visits = range(step * batch_size, (step + 1) * batch_size)
    return [(visit // size, _permutation(size, seed, visit // size)[visit % size]) for visit in visits]


def batch_at(step: int, *, size: int, batch_size: int, seed: int) -> list[int]:
    """Positions (0..size-1) of the samples that batch `step` (from 0) holds."""
    return [position for _, position in visits_at(step, size=size, batch_size=batch_size, seed=seed)]


@lru_cache(maxsize=2)
def draws_of_epoch(size: int, seed: int, epoch: int) -> Tensor:
    """One number from [0, 1) for each sample, float32 [size]: of what is chosen once for each visit, its caption."""
    return torch.rand(size, generator=torch_generator(seed, epoch, 0, OF_SAMPLES))


def part_rows(micro_batch: int, rank: int, num_ranks: int, count: int) -> range:
    """The rows of a step's batch that are in this micro-batch (from 0) on this rank, `count` of them."""
    first = (micro_batch * num_ranks + rank) * count
    return range(first, first + count)


class StepBatches(Sampler[list[tuple[int, int]]]):
    """An endless batch sampler that starts at any step and gives one rank's micro-batches of it, as `visits_at`.

    Args:
        size: Number of training samples.
        batch_size: Samples per optimizer step, over all micro-batches and ranks.
        start: First optimizer step to give.
        accumulate: Micro-batches per step.

    Raises:
        UserError: batch_size does not divide by the number of parts.
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
                f"batch_size={batch_size} must be a multiple of {accumulate * num_ranks}: {num_ranks} processes times "
                f"trainer.accumulate_grad_batches={accumulate}."
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.start, self.accumulate, self.rank, self.num_ranks = start, accumulate, rank, num_ranks

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step, count = self.start, self.batch_size // (self.accumulate * self.num_ranks)
        while True:
            batch = visits_at(step, size=self.size, batch_size=self.batch_size, seed=self.seed)
            for micro_batch in range(self.accumulate):
                rows = part_rows(micro_batch, self.rank, self.num_ranks, count)
                yield batch[rows.start : rows.stop]
            step += 1
