"""The results of a tool: a table, text and figures for people, and a JSON file for programs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

from ldm.files.atomic import atomic_write, write_text
from ldm.metrics.metric import metrics_to_json


@dataclass(frozen=True)
class Report:
    """Metrics, their settings and their presentation."""

    name: str
    """Name of the JSON file."""
    content: dict[str, Any]
    """Values by name. Each Metric becomes two keys in the JSON file."""
    table: Table | None = None
    lines: list[str] = field(default_factory=list)
    """Lines of text printed below the table."""
    figures: Mapping[str, Image.Image | Figure] = field(default_factory=dict)
    """Figures and images by file name."""

    def to_json(self) -> dict[str, Any]:
        return metrics_to_json(self.content)

    def print(self, width: int | None = None) -> None:
        """Print the table and the lines."""
        if self.table is not None:
            Console(highlight=False, width=width).print(self.table)
        for line in self.lines:
            print(line)

    def save(self, folder: Path) -> list[Path]:
        """Write the figures and then the JSON file. Return the paths of all files, starting with the JSON file."""
        for name, figure in self.figures.items():
            with atomic_write(folder / name) as partial:
                figure.savefig(partial) if isinstance(figure, Figure) else figure.save(partial)
        write_text(folder / self.name, json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n")
        return [folder / name for name in (self.name, *self.figures)]
