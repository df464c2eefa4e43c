"""Comparison reports: tables for the terminal, compare.json, and a self-contained HTML page."""

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
from ldm.files.untrusted import to_file_name
from ldm.metrics.report import Report

MAX_NAME_BYTES = 80


@dataclass(frozen=True)
class ComparisonReport:
    """A comparison and, if available, a figure with images of the runs."""

    comparison: Comparison
    figure: Image.Image | None = None
    notes: list[str] = field(default_factory=list)
    """Notes on the figure."""
    image_settings: dict[str, Any] = field(default_factory=dict)
    """Settings used to generate the images in the figure."""

    @property
    def folder_name(self) -> str:
        """Folder name made from the run names. A long name is truncated and ends with a hash of the full name."""
        name = "-vs-".join(run.name for _, run in self.comparison.runs)
        prefix, digest = to_file_name(name, MAX_NAME_BYTES), hashlib.sha256(name.encode()).hexdigest()[:8]
        return prefix if len(name.encode()) <= MAX_NAME_BYTES else f"{prefix}-{digest}"

    @property
    def lines(self) -> list[str]:
        """Lines of text below the tables."""
        equal = ", ".join(f"{name} {value:.4g}" for name, value in self.comparison.equal_metrics.items())
        return [*([f"Equal in all runs: {equal}."] if equal else []), *self.comparison.notes, *self.notes]

    def tables(self) -> dict[str, list[list[str]]]:
        """Return the rows of each table by title, with the header row first.

        The first tables list the runs and the config differences. For each further group, a table compares its metrics
        with those of the first group. If there is only one group, a table lists the metrics of that group.
        """
        comparison = self.comparison
        baseline, *candidates = comparison.groups
        run_rows = [[group.label, run.source, str(run.seed)] for group, run in comparison.runs]
        tables = {"Runs": [["group", "run", "seed"], *run_rows]}
        if comparison.differences:
            differences = [[key, *values] for key, values in comparison.differences.items()]
            tables["Differences"] = [["option", *(group.label for group in comparison.groups)], *differences]
        if not candidates:
            estimates = [
                [_row_title(row), format_estimate(estimate), (estimate and estimate.of) or ""]
                for row in comparison.rows
                for estimate in row.groups
            ]
            tables["Metrics"] = [["metric", baseline.label, "source of noise"], *estimates]
        for i, group in enumerate(candidates):
            rows = [["metric", baseline.label, group.label, f"{group.label} - {baseline.label}", "verdict"]]
            for row in comparison.rows:
                verdict = row.verdicts[i]
                numbers = (row.groups[0], row.groups[i + 1], verdict.difference)
                rows.append([_row_title(row), *map(format_estimate, numbers), format_verdict(verdict)])
            tables[f"{group.title} vs {baseline.title}"] = rows
        return tables

    def print(self, console: Console) -> Console:
        """Print the tables and the lines below them."""
        for title, (columns, *rows) in self.tables().items():
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
        """Return the tables as Markdown, for a W&B report."""
        return f"```\n{self.print(_recorder()).export_text()}```\n"

    def html(self, figures: Sequence[Path]) -> str:
        """Return one HTML page with the figures embedded."""
        page = self.print(_recorder()).export_html(inline_styles=True)
        encoded = [base64.b64encode(file.read_bytes()).decode() for file in figures]
        images = "".join(f'<p><img src="data:image/png;base64,{image}">' for image in encoded)
        return page.replace("</body>", f"{images}\n</body>").replace("<style>", "<style>\nimg { max-width: 100%; }")

    def save(self, folder: Path) -> list[Path]:
        """Write compare.json and compare.html, and compare.png (curves) and compare_images.png if available."""
        curves = [(group.title, run.curves) for group, run in self.comparison.runs]
        plots = {"compare.png": plot_curves(self.comparison.curve_names(), curves), "compare_images.png": self.figure}
        figures = {name: figure for name, figure in plots.items() if figure is not None}
        content = {**self.comparison.content(), "images": self.image_settings, "notes": self.lines}
        json_file, *figure_files = Report("compare.json", content, figures=figures).save(folder)
        page = folder / "compare.html"
        write_text(page, self.html(figure_files))
        return [json_file, page, *figure_files]


def format_number(value: float, half_width: float | None = None) -> str:
    """Format a value, rounded to the second significant digit of its error bar, or to four significant digits.

    Args:
        half_width: Half the width of the confidence interval, which is the error bar. None without an error bar.
    """
    if not half_width:
        return f"{value:.4g}"
    decimals = min(8, max(0, 1 - math.floor(math.log10(half_width))))
    return f"{value:z.{decimals}f}"  # z prints -0 as 0


def format_estimate(estimate: Estimate | None) -> str:
    """Format the mean and, on a second line, its error bar."""
    if estimate is None:
        return "-"
    if estimate.interval is None:
        return format_number(estimate.mean)
    half_width = (estimate.interval[1] - estimate.interval[0]) / 2
    return f"{format_number(estimate.mean, half_width)}\n+- {format_number(half_width, half_width)}"


def format_verdict(verdict: Verdict) -> str:
    """Format the verdict and, on a second line, the source of noise that the confidence interval covers."""
    noise = verdict.difference.of if verdict.difference is not None else None
    return f"{verdict.verdict}\n{noise}" if noise else verdict.verdict


def _row_title(row: Row) -> str:
    return row.metric.replace("_", " ") + (f"\n{row.better} is better" if row.better else "")


def _recorder() -> Console:
    """Return a console that records the tables, for export as text or HTML."""
    return Console(record=True, width=120, file=io.StringIO(), markup=False, highlight=False)
