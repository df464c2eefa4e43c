"""What the front door asks of a stage, whichever it is."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.images import ImageData
from ldm.runs.run import Run


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
    def finish(self, run: Run) -> tuple[dict[str, Any], Path]:
        """Write the weights for use; returns what was measured and a picture. The module holds the averaged weights."""

    @abstractmethod
    def next_command(self, run: Run) -> str:
        """What to do with a finished run, as a command that can be typed."""
