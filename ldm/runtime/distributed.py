"""What the processes of one training run hold together."""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

Value = TypeVar("Value")


def is_main_process() -> bool:
    """Whether this is the first of the processes, or the only one; known before they find each other."""
    return getattr(rank_zero_only, "rank", 0) == 0


def warn(message: str) -> None:
    """A warning on standard error, once for all processes of a training."""
    if is_main_process():
        print(f"warning: {message}", file=sys.stderr, flush=True)


def from_first(value: Value) -> Value:
    """What the first rank has here; every rank must ask."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_rows(micro_batches: Sequence[Tensor]) -> Tensor:
    """All rows of a step in their order (`ldm.data.order.part_rows`), from those of this rank's micro-batches.

    Each is [n, ...], of the same shape on every rank; every rank must ask.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return torch.cat(list(micro_batches))
    own = torch.stack(list(micro_batches))
    ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, own)
    return torch.stack(ranks, dim=1).flatten(0, 2)


class Agreement:
    """Questions that every rank answers with a number; the largest of them is everybody's answer."""

    def __init__(self) -> None:
        self._questions: dict[str, Callable[[], int]] = {}
        self.answers: dict[str, int] = {}

    def ask(self, name: str, question: Callable[[], int]) -> None:
        """Put a question, on every rank in the same order."""
        self._questions[name] = question

    def decide(self, trainer: Trainer) -> dict[str, int]:
        """The answers of this moment, which every rank must reach. One process asks nobody."""
        values = [int(question()) for question in self._questions.values()]
        if trainer.world_size > 1:
            shared = torch.tensor(values, device=trainer.strategy.root_device)
            dist.all_reduce(shared, dist.ReduceOp.MAX)
            values = shared.tolist()
        self.answers = dict(zip(self._questions, values, strict=True))
        return self.answers
