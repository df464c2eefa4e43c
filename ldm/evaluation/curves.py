"""Read training curves from metrics.csv, and plot them with one colour per group of runs."""

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
"""Colour-blind safe palette (Okabe and Ito 2008)."""
MAX_COLUMNS = 3
SMOOTHING_WIDTH = 20
"""Maximum width of the moving average, in logged values. Short curves use a tenth of their length as the width."""
STAGE_1_CURVES = ("val/psnr_db", "train/l1", "train/adaptive_weight", "train/discriminator_accuracy")
"""Curves to plot for an autoencoder and its discriminator, if any."""

Curve = tuple[list[int], list[float]]
"""Steps and values."""


def read_curves(file: Path) -> dict[str, Curve]:
    """Read the curves in a metrics.csv file, by column name. Each curve contains only the steps with a value.

    Raises:
        UserError: If the file is not a table with a step column and numeric values.
    """
    points: dict[str, dict[int, float]] = {}
    try:
        with file.open(encoding="utf-8", newline="") as rows:
            for row in csv.DictReader(rows):
                for name, text in row.items():
                    if name not in ("epoch", "step") and text:
                        points.setdefault(name, {})[int(row["step"])] = float(text)
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{file} is not a valid table of metrics: {first_line(error)}. Delete the file.") from error
    return {name: as_curve(values) for name, values in points.items()}


def as_curve(values: Mapping[int, float]) -> Curve:
    """Return the steps in ascending order, and their values."""
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def plot_curves(names: Sequence[str], runs: Sequence[tuple[str, Mapping[str, Curve]]]) -> Figure | None:
    """Plot one panel per curve name, or return None if no run has any of these curves.

    Args:
        runs: For each run, its title and its curves by name. Runs with the same title share a colour.
    """
    available = [name for name in names if any(name in curves for _, curves in runs)]
    if not available:
        return None
    columns = min(MAX_COLUMNS, len(available))
    rows = -(-len(available) // columns)
    figure = Figure(figsize=(4.3 * columns, 2.9 * rows + 0.7), layout="constrained")
    colours = dict(zip(dict.fromkeys(title for title, _ in runs), cycle(COLOURS), strict=False))
    for i, name in enumerate(available):
        axes = figure.add_subplot(rows, columns, i + 1)
        for title, curves in runs:
            if name in curves:
                steps, values = _smooth(name, curves[name])
                marker = "o" if len(steps) < SMOOTHING_WIDTH else None
                axes.plot(steps, values, color=colours[title], lw=1, marker=marker, ms=3)
        axes.set_title(name + (", moving average" if name.startswith("train/") else ""), fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.22)
    handles = [Line2D([], [], color=colour, lw=2, label=title) for title, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(handles)), frameon=False, fontsize=10)
    return figure


def _smooth(name: str, curve: Curve) -> Curve:
    """Smooth training curves, which are noisy because each value comes from one batch. Do not smooth other curves."""
    steps, values = curve
    width = min(SMOOTHING_WIDTH, len(values) // 10)
    if not name.startswith("train/") or width < 2:
        return curve
    return steps[width - 1 :], np.convolve(values, np.full(width, 1 / width), mode="valid").tolist()
