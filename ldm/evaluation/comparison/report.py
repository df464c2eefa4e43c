"""A comparison as tables for the terminal, as compare.json, and as one page that needs nothing beside itself."""

import base64
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from ldm.evaluation.comparison.compare import Comparison, Row
from ldm.evaluation.comparison.statistics import SAMPLING, Estimate, Verdict
from ldm.evaluation.curves import plot_curves
from ldm.files.atomic import write_text
from ldm.files.untrusted import file_name
from ldm.metrics.report import Report

LONGEST_NAME = 80


@dataclass(frozen=True)
class ComparisonReport:
    """A comparison with its picture of images, where there is one."""

    comparison: Comparison
    samples: Image.Image | None = None
    notes: list[str] = field(default_factory=list)
    """On the picture."""
    drawn: dict[str, Any] = field(default_factory=dict)
    """How its images were drawn."""

    @property
    def folder_name(self) -> str:
        """The names of the runs, a long list cut and told apart by its hash."""
        name = "-vs-".join(run.name for _, run in self.comparison.runs)
        cut = file_name(name, LONGEST_NAME)
        return cut if len(name.encode()) <= LONGEST_NAME else f"{cut}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

    @property
    def lines(self) -> list[str]:
        """What stands below the tables."""
        same = ", ".join(f"{name} {value:.4g}" for name, value in self.comparison.equal.items())
        return [*([f"Equal in all runs: {same}."] if same else []), *self.comparison.notes, *self.notes]

    def sheets(self) -> dict[str, list[list[str]]]:
        """By title, the rows of a table, its header first: who is compared, what differs, and what is found.

        The metrics of each group but the first stand beside those of the first.
        """
        found = self.comparison
        first, *others = found.groups
        members = [[group.label, run.place, str(run.seed)] for group, run in found.runs]
        sheets = {"Runs": [["group", "run", "seed"], *members]}
        if found.differences:
            unlike = [[key, *values] for key, values in found.differences.items()]
            sheets["What differs"] = [["", *(group.label for group in found.groups)], *unlike]
        if not others:
            spread = [
                [_row_title(row), format_estimate(own), (own and own.of) or ""]
                for row in found.rows
                for own in row.groups
            ]
            sheets["Metrics"] = [["metric", first.label, "of"], *spread]
        for i, other in enumerate(others):
            sheet = [["metric", first.label, other.label, f"{other.label} - {first.label}", ""]]
            for row in found.rows:
                verdict = row.verdicts[i]
                shown = (row.groups[0], row.groups[i + 1], verdict.difference)
                sheet.append([_row_title(row), *map(format_estimate, shown), format_verdict(verdict)])
            sheets[f"{other.title} beside {first.title}"] = sheet
        return sheets

    def print(self, console: Console) -> Console:
        """Print the tables, and what stands below them."""
        for title, (columns, *rows) in self.sheets().items():
            table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
            for name in columns:
                table.add_column(name, overflow="fold", min_width=None if name else len(SAMPLING))
            for cells in rows:
                table.add_row(*cells, style="bold green" if " better" in cells[-1] else "")
            console.print(table)
        for line in self.lines:
            console.print(line, soft_wrap=True)
        return console

    def markdown(self) -> str:
        """For a W&B report."""
        return f"```\n{self.print(_recorder()).export_text()}```\n"

    def html(self, pictures: Sequence[Path]) -> str:
        """One page with its pictures inside."""
        page = self.print(_recorder()).export_html(inline_styles=True)
        encoded = [base64.b64encode(file.read_bytes()).decode() for file in pictures]
        images = "".join(f'<p><img src="data:image/png;base64,{image}">' for image in encoded)
        return page.replace("</body>", f"{images}\n</body>").replace("<style>", "<style>\nimg { max-width: 100%; }")

    def save(self, folder: Path) -> list[Path]:
        """compare.json, compare.html, compare.png of the curves and compare_images.png, where there are such."""
        curves = [(group.title, run.curves) for group, run in self.comparison.runs]
        drawn = {"compare.png": plot_curves(self.comparison.curve_names(), curves), "compare_images.png": self.samples}
        pictures = {name: picture for name, picture in drawn.items() if picture is not None}
        content = {**self.comparison.content(), "images": self.drawn, "notes": self.lines}
        data, *files = Report("compare.json", content, pictures=pictures).save(folder)
        page = folder / "compare.html"
        write_text(page, self.html(files))
        return [data, page, *files]


def format_number(value: float, width: float | None = None) -> str:
    """To the second digit of its noise, or to four digits where that is not known."""
    if not width:
        return f"{value:.4g}"
    decimals = min(8, max(0, 1 - math.floor(math.log10(width))))
    return f"{value:z.{decimals}f}"  # z: no minus before a zero


def format_estimate(found: Estimate | None) -> str:
    """A mean above the half width of its interval."""
    if found is None:
        return "-"
    if found.interval is None:
        return format_number(found.mean)
    width = (found.interval[1] - found.interval[0]) / 2
    return f"{format_number(found.mean, width)}\n+- {format_number(width, width)}"


def format_verdict(found: Verdict) -> str:
    """A verdict above what its interval is of."""
    noise = found.difference.of if found.difference is not None else None
    return f"{found.verdict}\n{noise}" if noise else found.verdict


def _row_title(row: Row) -> str:
    return row.metric.replace("_", " ") + (f"\n{row.better} is better" if row.better else "")


def _recorder() -> Console:
    """What turns the tables into text or HTML."""
    return Console(record=True, width=120, file=io.StringIO(), markup=False, highlight=False)
