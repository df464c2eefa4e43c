"""Training curves of several runs over each other, one colour per group."""

from collections.abc import Sequence
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ldm.evaluation.comparison.compare import Group
from ldm.evaluation.reconstructions.curves import Curve

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#8a8a8a")
"""Readable without telling red from green (Okabe and Ito 2008)."""
COLUMNS = 3
SMOOTHED = 20
"""Values of a training loss that are averaged, one batch each: at most so many, and a tenth of the curve."""


def curve_names(groups: Sequence[Group]) -> list[str]:
    """What is drawn: everything of the held-out images, and the training loss."""
    found = {name for group in groups for run in group.runs for name in run.curves}
    chosen = sorted(name for name in found if name.startswith("val/"))
    return [*chosen, *(["train/loss"] if "train/loss" in found else [])]


def plot_curves(groups: Sequence[Group]) -> Figure | None:
    """A panel per curve over the steps; None where no run has any."""
    names = curve_names(groups)
    if not names:
        return None
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.3 * columns, 2.9 * rows + 0.7), layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, i + 1)
        for group, colour in zip(groups, cycle(COLOURS), strict=False):
            for steps, values in (_smoothed(name, run.curves[name]) for run in group.runs if name in run.curves):
                axes.plot(steps, values, color=colour, lw=1, marker="o" if len(steps) < SMOOTHED else None, ms=3)
        axes.set_title(name + (", mean of neighbouring batches" if name.startswith("train/") else ""), fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.22)
    colours = zip(groups, cycle(COLOURS), strict=False)
    handles = [Line2D([], [], color=colour, lw=2, label=group.title) for group, colour in colours]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(handles)), frameon=False, fontsize=10)
    return figure


def _smoothed(name: str, curve: Curve) -> Curve:
    """As it is, or of a loss of single batches the mean of the last ones."""
    steps, values = curve
    width = min(SMOOTHED, len(values) // 10)
    if not name.startswith("train/") or width < 2:
        return curve
    return steps[width - 1 :], np.convolve(values, np.full(width, 1 / width), mode="valid").tolist()
