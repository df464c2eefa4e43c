"""A comparison as tables for the terminal, as compare.json, and as one page that needs nothing beside itself."""

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from ldm.evaluation.comparison.compare import Comparison, Row
from ldm.evaluation.comparison.curves import plot_curves
from ldm.evaluation.comparison.statistics import SAMPLING, Estimate, Verdict, estimate
from ldm.files.atomic import durable_file, write_text
from ldm.files.untrusted import file_name

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; }
pre { font: 13px/1.3 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-x: auto; }
img { max-width: 100%; background: #fff; }
"""
LONGEST_NAME = 80
BETTER = re.compile(r"\S+ better$", re.MULTILINE)
"""A verdict that finds one."""


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
        name = file_name("-vs-".join(run.name for _, run in self.comparison.runs), 100_000)
        if len(name.encode()) <= LONGEST_NAME:
            return name
        return f"{file_name(name, LONGEST_NAME - 9)}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

    @property
    def lines(self) -> list[str]:
        """What stands below the tables."""
        same = ", ".join(f"{name} {value:.4g}" for name, value in self.comparison.equal.items())
        return [*([f"Equal in all runs: {same}."] if same else []), *self.comparison.notes, *self.notes]

    def sheets(self, *, by_run: bool = False) -> dict[str, list[list[str]]]:
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
                sheet.append([_row_title(row), *map(format_estimate, shown), format_verdict(row, verdict)])
            sheets[f"{other.title} beside {first.title}"] = sheet
        if by_run:
            sheets["Metrics by run"] = [["", *(run.name for _, run in found.runs)]]
            for row in found.rows:
                metrics = [run.metrics.get(row.metric) for _, run in found.runs]
                single = [None if metric is None else estimate([metric], enough_seeds=False) for metric in metrics]
                sheets["Metrics by run"].append([row.metric, *map(format_estimate, single)])
        return sheets

    def markdown(self) -> str:
        """For a W&B report."""
        return f"```\n{self._recorded().export_text()}```\n" + "".join(f"- {line}\n" for line in self.lines)

    def html(self, pictures: Sequence[Path]) -> str:
        """One page with its pictures inside."""
        title = escape(" vs ".join(group.runs[0].name for group in self.comparison.groups))
        settings = ", ".join(f"{key}={value}" for key, value in self.drawn.items())
        body = [
            self._recorded().export_html(inline_styles=True, code_format="<pre>{code}</pre>"),
            "<ul>" + "".join(f"<li>{escape(line)}" for line in self.lines) + "</ul>",
            *(_html_image(picture) for picture in pictures),
            f"<p>{escape(settings)}</p>",
        ]
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n" + "\n".join(body) + "\n</body></html>\n"
        )

    def print(self, console: Console, *, by_run: bool = False) -> Console:
        """Print the tables."""
        for title, (columns, *rows) in self.sheets(by_run=by_run).items():
            table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
            for name in columns:
                table.add_column(name, overflow="fold", min_width=None if name else len(SAMPLING))
            for cells in rows:
                table.add_row(*cells, style="bold green" if BETTER.match(cells[-1]) else "")
            console.print(table)
        return console

    def _recorded(self) -> Console:
        width = max(120, 20 * len(self.comparison.runs))
        recording = Console(record=True, width=width, file=io.StringIO(), markup=False, highlight=False)
        return self.print(recording, by_run=True)

    def save(self, folder: Path) -> list[Path]:
        """compare.json, compare.html, compare.png of the curves and compare_images.png, where there are such."""
        figure = plot_curves(self.comparison.groups)
        pictures: dict[Path, Callable[[Path], Any]] = {}
        if figure is not None:
            pictures[folder / "compare.png"] = figure.savefig
        if self.samples is not None:
            pictures[folder / "compare_images.png"] = self.samples.save
        for file, save in pictures.items():
            with durable_file(file) as partial:
                save(partial)
        content = {**self.comparison.content(), "images": self.drawn, "notes": self.lines}
        files = [folder / "compare.json", folder / "compare.html", *pictures]
        write_text(files[0], json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        write_text(files[1], self.html(files[2:]))
        return files


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


def format_verdict(row: Row, found: Verdict) -> str:
    """A verdict above what its interval is of; nothing of metrics that are neither good nor bad and have no noise."""
    if found.difference is not None and found.difference.of is not None:
        return f"{found.verdict}\n{found.difference.of}"
    return found.verdict if row.better else ""


def _row_title(row: Row) -> str:
    return row.metric.replace("_", " ") + (f"\n{row.better} is better" if row.better else "")


def _html_image(file: Path) -> str:
    return f'<img alt="{file.stem}" src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">'
