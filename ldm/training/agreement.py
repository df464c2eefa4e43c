"""What the ranks of a distributed training must decide alike: one reduction answers all of it."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer


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
