"""What was logged while runs trained: their curves by name, and pictures of them, one colour per group of runs."""

import csv
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ldm.errors import UserError
from ldm.files.untrusted import first_line

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#8a8a8a")
"""Readable without telling red from green (Okabe and Ito 2008)."""
COLUMNS = 3
SMOOTHED = 20
"""Values of a training loss that are averaged, one batch each: at most so many, and a tenth of the curve."""
OF_STAGE_1 = ("val/psnr_db", "train/l1", "train/adaptive_weight", "train/discriminator_accuracy")
"""How a training of an autoencoder went, with its discriminator's game where there was one."""

Curve = tuple[list[int], list[float]]
"""Steps, values."""


def read_curves(file: Path) -> dict[str, Curve]:
    """Every column of a metrics.csv by name, with the steps at which it has a value.

    Raises:
        UserError: it is no table of numbers by step.
    """
    points: dict[str, dict[int, float]] = {}
    try:
        with file.open(encoding="utf-8", newline="") as rows:
            for row in csv.DictReader(rows):
                for name, text in row.items():
                    if name not in ("epoch", "step") and text:
                        points.setdefault(name, {})[int(row["step"])] = float(text)
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{file} is no table of numbers by step: {first_line(error)}. Delete it.") from error
    return {name: as_curve(values) for name, values in points.items()}


def as_curve(values: Mapping[int, float]) -> Curve:
    """Values by step, in the order of the steps. A run that was killed and resumed logs some twice: the last counts."""
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def plot_curves(names: Sequence[str], runs: Sequence[tuple[str, Mapping[str, Curve]]]) -> Figure | None:
    """A panel over the steps for each of the names that some run has; None where there is none.

    Args:
        runs: Titles and curves by name; runs with the same title share a colour.
    """
    shown = [name for name in names if any(name in curves for _, curves in runs)]
    if not shown:
        return None
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.3 * columns, 2.9 * rows + 0.7), layout="constrained")
    colours = dict(zip(dict.fromkeys(title for title, _ in runs), cycle(COLOURS), strict=False))
    for i, name in enumerate(shown):
        axes = figure.add_subplot(rows, columns, i + 1)
        for title, curves in runs:
            if name in curves:
                steps, values = _smoothed(name, curves[name])
                marker = "o" if len(steps) < SMOOTHED else None
                axes.plot(steps, values, color=colours[title], lw=1, marker=marker, ms=3)
        axes.set_title(name + (", mean of neighbouring batches" if name.startswith("train/") else ""), fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.22)
    handles = [Line2D([], [], color=colour, lw=2, label=title) for title, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(handles)), frameon=False, fontsize=10)
    return figure


def _smoothed(name: str, curve: Curve) -> Curve:
    """As it is, or of a loss of single batches the mean of the last ones."""
    steps, values = curve
    width = min(SMOOTHED, len(values) // 10)
    if not name.startswith("train/") or width < 2:
        return curve
    return steps[width - 1 :], np.convolve(values, np.full(width, 1 / width), mode="valid").tolist()
