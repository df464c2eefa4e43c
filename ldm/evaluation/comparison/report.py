"""A comparison as tables for the terminal, as compare.json, and as one page that needs nothing beside itself."""

import base64
import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from rich import box
from rich.table import Table

from ldm.evaluation.comparison.compare import Comparison, Row
from ldm.evaluation.comparison.curves import plot_curves
from ldm.evaluation.comparison.statistics import SAMPLING, Estimate, Verdict, estimate_mean
from ldm.files.atomic import durable_file, write_text
from ldm.files.untrusted import file_name
from ldm.metrics.metric import Metric

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #656d76; --line: #d0d7de; --paper: #fff; --good: #0b6e4f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #9198a1; --line: #3d444d; --paper: #0d1117; --good: #56d4a0; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } small, .faint { color: var(--faint); } .good { color: var(--good); font-weight: 600; }
img { max-width: 100%; background: #fff; border-radius: 6px; }
"""

LONGEST_NAME = 80
WIDEST = len(SAMPLING)
"""Of a column of verdicts, whose words stay together."""


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
    def title(self) -> str:
        return " vs ".join(group.runs[0].name for group in self.comparison.groups)

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
        found, equal = self.comparison, self.comparison.equal
        same = ", ".join(f"{name} {value:.4g}" for name, value in equal.items())
        return [*([f"Equal in all runs: {same}."] if equal else []), *found.notes, *self.notes]

    def tables(self) -> list[Table]:
        """Who is compared, what differs, and for each group but the first its figures beside the first's."""
        groups = self.comparison.groups
        members = _table("Runs", "group", "runs", "seed")
        for group in groups:
            for run in group.runs:
                members.add_row(group.label, run.place, str(run.seed))
        found = [members]
        if self.comparison.differences:
            unlike = _table("What differs", "", *(group.label for group in groups))
            for key, values in self.comparison.differences.items():
                unlike.add_row(key, *values)
            found.append(unlike)
        if len(groups) == 1:
            spread = _table("Figures, one config", "figure", "A", "of")
            for row in self.comparison.rows:
                own = row.estimates[0]
                spread.add_row(_row_title(row), format_estimate(own), (own.noise if own is not None else None) or "")
            found.append(spread)
        for i, group in enumerate(groups[1:]):
            first, label = groups[0].label, group.label
            table = _table(f"{group.title} beside {groups[0].title}", "figure")
            for name in (first, label, f"{label} - {first}"):
                table.add_column(name, no_wrap=True)
            table.add_column("", width=WIDEST, overflow="fold")
            for row in self.comparison.rows:
                verdict = row.verdicts[i]
                shown = (row.estimates[0], row.estimates[i + 1], verdict.difference)
                style = "bold green" if verdict.text.endswith("better") else ""
                table.add_row(_row_title(row), *map(format_estimate, shown), format_verdict(row, verdict), style=style)
            found.append(table)
        return found

    def sheet(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows of one table with everything: figures by group, differences and verdicts."""
        groups = self.comparison.groups
        columns = ["figure", "better", *(group.title for group in groups)]
        for group in groups[1:]:
            columns += [f"{group.label} - {groups[0].label}", f"{group.label} beside {groups[0].label}"]
        rows = []
        for row in self.comparison.rows:
            cells = [row.metric, {1: "higher", -1: "lower", 0: ""}[row.way], *map(format_estimate, row.estimates)]
            for verdict in row.verdicts:
                cells += [format_estimate(verdict.difference), format_verdict(row, verdict)]
            rows.append(cells)
        return columns, rows

    def markdown(self) -> str:
        """For a W&B report."""
        groups = self.comparison.groups
        members = [
            f"- **{group.label}**: {', '.join(f'{run.place} (seed {run.seed})' for run in group.runs)}"
            for group in groups
        ]
        unlike = [[key, *values] for key, values in self.comparison.differences.items()]
        parts = ["\n".join(members), _markdown_table(["differs", *(group.label for group in groups)], unlike)]
        return (
            "\n\n".join([*parts, _markdown_table(*self.sheet()), "\n".join(f"- {line}" for line in self.lines)]) + "\n"
        )

    def html(self, curves: bytes | None) -> str:
        """One page with its pictures inside."""
        groups, columns, rows = self.comparison.groups, *self.sheet()
        members = [[group.label, run.place, str(run.seed), run.name] for group, run in self.comparison.runs]
        unlike = [[key, *values] for key, values in self.comparison.differences.items()]
        by_run = [
            [row.metric, *(_format_single(run.metrics.get(row.metric)) for _, run in self.comparison.runs)]
            for row in self.comparison.rows
        ]
        names = [f"{group.label} {run.name}" for group, run in self.comparison.runs]
        body = [
            f"<h1>{escape(self.title)}</h1>",
            _html_table(["group", "run", "seed", "name"], members),
            *(["<h2>What differs</h2>", _html_table(["", *(g.label for g in groups)], unlike)] if unlike else []),
            "<h2>Figures by group</h2><p class=faint>Means with their 95 % intervals; differences from group "
            f"{groups[0].label}.</p>",
            _html_table(columns, rows),
            "<ul>" + "".join(f"<li>{escape(line)}" for line in self.lines) + "</ul>",
            "<h2>Figures by run</h2><p class=faint>Intervals of sampling noise, where the evaluation states it.</p>",
            _html_table(["figure", *names], by_run),
        ]
        if curves:
            body += ["<h2>Training</h2>", _html_image(curves, "training curves")]
        if self.samples is not None:
            settings = ", ".join(f"{key}={value}" for key, value in self.drawn.items())
            body += [
                f"<h2>Images</h2><p class=faint>{escape(settings)}</p>",
                _html_image(_png_bytes(self.samples), "images"),
            ]
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
        )

    def save(self, folder: Path) -> list[Path]:
        """compare.json, compare.html, compare.png of the curves and compare_images.png, where there are such."""
        content = {**self.comparison.content(), "images": self.drawn, "notes": self.lines}
        files = [folder / "compare.json", folder / "compare.html"]
        write_text(files[0], json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        figure, curves = plot_curves(self.comparison.groups), None
        if figure is not None:
            files.append(folder / "compare.png")
            with durable_file(files[-1]) as partial:
                figure.savefig(partial, dpi=110)
            curves = files[-1].read_bytes()
        if self.samples is not None:
            files.append(folder / "compare_images.png")
            with durable_file(files[-1]) as partial:
                self.samples.save(partial)
        write_text(files[1], self.html(curves))
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
    width = found.half_width
    return format_number(found.mean, width) + ("" if width is None else f"\n+- {format_number(width, width)}")


def format_verdict(row: Row, verdict: Verdict) -> str:
    """A verdict above what its interval is of; nothing of figures that are neither good nor bad and have no noise."""
    if verdict.difference is not None and verdict.difference.noise is not None:
        return f"{verdict.text}\n{verdict.difference.noise}"
    return verdict.text if row.way else ""


def _format_single(metric: Metric | None) -> str:
    return format_estimate(None if metric is None else estimate_mean([metric], enough_seeds=False))


def _row_title(row: Row) -> str:
    better = {1: "\nhigher is better", -1: "\nlower is better", 0: ""}[row.way]
    return row.metric.replace("_", " ") + better


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=not name)
    return table


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in row) + " |" for row in lines
    )


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{_html_cell(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _html_cell(text: str) -> str:
    first, *rest = escape(text).split("\n")
    marked = f"<span class=good>{first}</span>" if first.endswith(" better") else first
    return marked + "".join(f"<br><small>{line.replace('+-', '±')}</small>" for line in rest)


def _html_image(png: bytes, alt: str) -> str:
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _png_bytes(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
