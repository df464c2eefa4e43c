"""Interface of a training stage."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.images import ImageData
from ldm.runs.run import Run


class Stage(ABC):
    """A training stage, which combines a LightningModule with its data, start-up summary and outputs."""

    kind: str
    module: Any  # a TrainingModule
    images: ImageData
    trains = True
    """False if pretrained weights are used without training, so that only `finish` runs."""

    @classmethod
    @abstractmethod
    def check(cls, resolution: int, **options: Any) -> None:
        """Check the options of the stage before the images are prepared.

        Raises:
            UserError: The options are not compatible.
        """

    @abstractmethod
    def fetch(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> Any:
        """Load one batch on the CPU.

        Args:
            epochs: Epoch of each sample, which seeds the choice of the sample's caption. None outside training.
        """

    def compile(self) -> None:
        """Compile the trained network."""
        self.module.trained.compile()

    @abstractmethod
    def summary_rows(self) -> list[tuple[str, str]]:
        """Return (label, value) pairs for the start-up table."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return the fields of run.json that describe the stage, as plain values."""

    @abstractmethod
    def finish(self, run: Run) -> tuple[dict[str, Any], Path]:
        """Save the network, which already has the EMA weights. Return the final metrics and the path of a figure."""

    @abstractmethod
    def next_command(self, run: Run) -> str:
        """Return the shell command to run after this stage has finished."""
