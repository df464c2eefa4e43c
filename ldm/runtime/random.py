"""Random numbers as a pure function of seed, step and row. All random generators of the project are seeded here."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

BLOCK_SIZE = 16
"""Number of rows that share a generator.

Compared with one generator per row, this takes 1/16 of the calls and discards at most 2 BLOCK_SIZE - 2 rows.
"""


def derive_seed(*integers: int) -> int:
    """Derive a 63-bit seed from several integers with SplitMix64's finaliser."""
    mask, state = 2**64 - 1, 0
    for integer in integers:
        state = (state + integer + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def torch_generator(*integers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new torch generator. A single integer is its seed; several are combined by `derive_seed`."""
    return torch.Generator(device=device).manual_seed(_seed(integers))


def numpy_generator(*integers: int) -> np.random.Generator:
    """Return a new NumPy generator, seeded in the same way as `torch_generator`."""
    return np.random.default_rng(_seed(integers))


def sample_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """Return one CPU generator per sample, so that sample i depends only on the seed and i, on any device.

    Does not use `derive_seed`, so that a seed yields the same samples as in earlier versions.
    """
    return [torch_generator(seed * 1_000_003 + index) for index in indices]


def _seed(integers: Sequence[int]) -> int:
    return integers[0] if len(integers) == 1 else derive_seed(*integers)


class Draws:
    """Random numbers for a range of rows, bit-identical to the same rows of the full batch.

    Rows are drawn in blocks, each with its own generator, seeded by (seed, step, block). All ranks and micro-batches of
    a step must make the same calls in the same order.

    Args:
        seed: Seed of the run.
        step: Optimizer step.
        rows: Rows of the full batch to draw.
        device: Device of the generators. CPU and GPU draw different numbers.
    """

    def __init__(self, seed: int, step: int, rows: range, device: torch.device | str = "cpu") -> None:
        start, stop = rows.start // BLOCK_SIZE, -(-rows.stop // BLOCK_SIZE)
        self._rows = slice(rows.start - start * BLOCK_SIZE, rows.stop - start * BLOCK_SIZE)
        self._generators = [torch_generator(seed, step, block, device=device) for block in range(start, stop)]

    def draw(self, function: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """Draw the rows with `function(count, generator)`, which must return [count, ...] with independent rows."""
        return torch.cat([function(BLOCK_SIZE, generator) for generator in self._generators])[self._rows]

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Draw from N(0, 1). The first dimension of the shape must be the number of rows."""
        return self.draw(lambda count, g: torch.randn(count, *shape[1:], generator=g, device=g.device))

    def rand(self, shape: Sequence[int]) -> Tensor:
        """Draw uniformly from [0, 1). The first dimension of the shape must be the number of rows."""
        return self.draw(lambda count, g: torch.rand(count, *shape[1:], generator=g, device=g.device))

    def randint(self, low: int, high: int) -> Tensor:
        """Draw one of low, ..., high - 1 for each row."""
        return self.draw(lambda count, g: torch.randint(low, high, (count,), generator=g, device=g.device))
