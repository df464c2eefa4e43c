"""What a tool found, as people and programs read it: a table, lines, pictures, and a JSON of everything."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

from ldm.files.atomic import durable_file, write_text
from ldm.metrics.metric import metrics_to_json


@dataclass(frozen=True)
class Report:
    """Metrics and their settings, and how they are shown."""

    name: str
    """Of the JSON file."""
    content: dict[str, Any]
    """By name; a Metric becomes two keys of the JSON."""
    table: Table | None = None
    lines: list[str] = field(default_factory=list)
    """What stands below the table."""
    pictures: Mapping[str, Image.Image | Figure] = field(default_factory=dict)
    """By file name."""

    def to_json(self) -> dict[str, Any]:
        return metrics_to_json(self.content)

    def print(self, width: int | None = None) -> None:
        """Print the table and the lines."""
        if self.table is not None:
            Console(highlight=False, width=width).print(self.table)
        for line in self.lines:
            print(line)

    def save(self, folder: Path) -> list[Path]:
        """Write the JSON, as the last of the files, and the pictures beside it; returns them, the JSON first."""
        for name, picture in self.pictures.items():
            with durable_file(folder / name) as partial:
                picture.savefig(partial) if isinstance(picture, Figure) else picture.save(partial)
        write_text(folder / self.name, json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n")
        return [folder / name for name in (self.name, *self.pictures)]
