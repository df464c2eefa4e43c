"""Interface of a training stage."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.images import ImageData
from ldm.runs.run import Run


class Stage(ABC):
    """A LightningModule with its data, its rows of the start-up table and its outputs."""

    kind: str
    module: Any  # a TrainingModule
    images: ImageData
    trains = True
    """False if pretrained weights are used without training; only `finish` runs then."""

    @classmethod
    @abstractmethod
    def check(cls, resolution: int, **options: Any) -> None:
        """Check the options of the stage before its images are prepared.

        Raises:
            UserError: The options are not compatible.
        """

    @abstractmethod
    def fetch(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> Any:
        """Load one batch on the CPU.

        Args:
            epochs: The epoch of each sample, which seeds its random choice of caption; None outside training.
        """

    def compile(self) -> None:
        """Compile the network that is trained."""
        self.module.trained.compile()

    @abstractmethod
    def summary_rows(self) -> list[tuple[str, str]]:
        """Return (label, value) pairs for the start-up table."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return the fields of run.json that describe the stage, as plain values."""

    @abstractmethod
    def finish(self, run: Run) -> tuple[dict[str, Any], Path]:
        """Write the averaged weights, which the module already has; return the final metrics and a figure."""

    @abstractmethod
    def next_command(self, run: Run) -> str:
        """Return the shell command to run after this stage has finished."""
