"""Random numbers as a pure function of seed, step and row: every generator of this project is seeded here."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

BLOCK = 16
"""Rows that share a generator: a part draws at most 2 BLOCK - 2 rows more than it has, in a sixteenth of the calls."""


def derive_seed(*parts: int) -> int:
    """One 63-bit seed from several integers (SplitMix64's finaliser), for a generator of its own."""
    mask, state = 2**64 - 1, 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def torch_generator(*parts: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for these integers; a single one is the seed itself, several are derived from."""
    return torch.Generator(device=device).manual_seed(_seed(parts))


def numpy_generator(*parts: int) -> np.random.Generator:
    """The same for numpy."""
    return np.random.default_rng(_seed(parts))


def sample_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per sample: what sample i draws depends on seed and i alone, on any device.

    Not by `derive_seed`: sample i of a seed stays the image that it always was.
    """
    return [torch_generator(seed * 1_000_003 + index) for index in indices]


def _seed(parts: Sequence[int]) -> int:
    return parts[0] if len(parts) == 1 else derive_seed(*parts)


class Draws:
    """The random numbers of some rows of a step: bit for bit those that the whole step would draw for them.

    Rows are drawn in blocks, each from a generator of its own, seeded by (seed, step, block). Every part of a step
    makes the same draws in the same order.

    Args:
        rows: Which rows of the step's batch.
        device: Where numbers are drawn; each kind of device has a stream of its own.
    """

    def __init__(self, seed: int, step: int, rows: range, device: torch.device | str = "cpu") -> None:
        first, end = rows.start // BLOCK, -(-rows.stop // BLOCK)
        self._rows = slice(rows.start - first * BLOCK, rows.stop - first * BLOCK)
        self._generators = [torch_generator(seed, step, block, device=device) for block in range(first, end)]

    def draw(self, function: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """These rows of what `function(count, generator)` draws, [count, ...], row by row independent."""
        return torch.cat([function(BLOCK, generator) for generator in self._generators])[self._rows]

    def randn(self, shape: Sequence[int]) -> Tensor:
        """N(0, 1) of a shape that begins with the number of rows."""
        return self.draw(lambda count, g: torch.randn(count, *shape[1:], generator=g, device=g.device))

    def rand(self, shape: Sequence[int]) -> Tensor:
        """Uniform in [0, 1) of a shape that begins with the number of rows."""
        return self.draw(lambda count, g: torch.rand(count, *shape[1:], generator=g, device=g.device))

    def randint(self, low: int, high: int) -> Tensor:
        """One of low, ..., high - 1 for each row."""
        return self.draw(lambda count, g: torch.randint(low, high, (count,), generator=g, device=g.device))
