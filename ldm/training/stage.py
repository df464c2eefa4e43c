"""What the front door asks of a stage, whichever it is."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ldm.data.images import ImageData
from ldm.run import Run


@dataclass(frozen=True)
class OptimizerFactory:
    """Makes the optimizer; parameters of fewer than two dimensions (biases, norms) are not decayed.

    The matrices in a transformer's blocks come as a group of their own, marked `hidden`, for optimizers that treat
    them apart.

    Args:
        build: parameter groups -> optimizer, e.g. a partial of torch.optim.AdamW.
    """

    build: Callable[..., torch.optim.Optimizer]

    def __call__(self, *modules: nn.Module) -> torch.optim.Optimizer:
        trained = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
        hidden = [p for name, p in trained if p.ndim == 2 and _is_hidden(name)]
        decayed = [p for name, p in trained if p.ndim >= 2 and not (p.ndim == 2 and _is_hidden(name))]
        kept = [p for _, p in trained if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
        if hidden:
            groups.append({"params": hidden, "hidden": True})
        return self.build([group for group in groups if group["params"]])


def _is_hidden(name: str) -> bool:
    """A matrix between a transformer's hidden layers; adaLN's modulation is an output of the embedding instead."""
    return name.startswith("blocks.") and "modulation" not in name


@dataclass
class Outcome:
    """What a finished stage tells the user."""

    figures: dict[str, Any] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)


class Stage(ABC):
    """A LightningModule with its data, its rows in the table at the start, and what it leaves at the end."""

    kind: str
    module: Any  # a TrainingModule
    images: ImageData
    trains = True
    """False where the weights are used as they come: `finish` is then all there is to do."""

    @classmethod
    @abstractmethod
    def check(cls, resolution: int, **options: Any) -> None:
        """Refuse what can be refused before the images are prepared; `options` are the stage's own.

        Raises:
            UserError: choices that do not go together.
        """

    @abstractmethod
    def fetch(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> Any:
        """One batch, on the CPU; with the epoch of each sample while training, whose draws are those of that epoch."""

    def compile(self) -> None:
        """Compile what a step runs."""
        self.module.trained.compile()

    @abstractmethod
    def rows(self) -> list[tuple[str, str]]:
        """(label, value) pairs for the table at the start."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Plain values for run.json."""

    @abstractmethod
    def finish(self, run: Run) -> Outcome:
        """Write the weights for use, pictures and figures. The module holds the averaged weights."""

    @abstractmethod
    def next_command(self, run: Run) -> str:
        """What to do with a finished run, as a command that can be typed."""
