"""Training curves of several runs over each other, one colour per group, its seeds faint behind their mean."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ldm.evaluation.comparison.compare import Group
from ldm.evaluation.reconstructions.curves import Curve

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#8a8a8a")
"""Readable without telling red from green (Okabe and Ito 2008)."""
COLUMNS = 3
SMOOTHED = 20
"""Values of a training loss that are averaged, one batch each: at most so many, and a tenth of the curve."""
FEW = 20
"""Points of a curve that are marked one by one."""


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
    panels = figure.subplots(rows, columns, squeeze=False).flat
    colours = {group.label: COLOURS[i % len(COLOURS)] for i, group in enumerate(groups)}
    for axes, name in zip(panels, names, strict=False):
        for group in groups:
            curves = [_smoothed(name, run.curves[name]) for run in group.runs if name in run.curves]
            _plot_group(axes, curves, colours[group.label])
        mean = ", mean of neighbouring batches" if name.startswith("train/") else ""
        axes.set_title(f"{name}{mean}", fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.22)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(figure.axes)[len(names) :]:
        axes.set_axis_off()
    handles = [Line2D([], [], color=colours[group.label], lw=2, label=group.title) for group in groups]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(handles)), frameon=False, fontsize=10)
    return figure


def _plot_group(axes: Axes, curves: Sequence[Curve], colour: str) -> None:
    marks = ["o" if len(steps) < FEW else None for steps, _ in curves]  # of one point there is no line
    if len(curves) == 1:
        axes.plot(*curves[0], color=colour, lw=1.5, marker=marks[0], ms=3)
        return
    for (steps, values), mark in zip(curves, marks, strict=True):
        axes.plot(steps, values, color=colour, lw=0.9, alpha=0.3, marker=mark, ms=3)
    common = sorted(set.intersection(*({*steps} for steps, _ in curves))) if curves else []
    if common:
        at_common = [[value for step, value in zip(*curve, strict=True) if step in {*common}] for curve in curves]
        mark = "o" if len(common) < FEW else None
        axes.plot(common, np.mean(at_common, axis=0), color=colour, lw=1.8, marker=mark, ms=4)


def _smoothed(name: str, curve: Curve) -> Curve:
    """As it is, or the running mean of a loss of single batches, at its middle steps."""
    steps, values = curve
    width = min(SMOOTHED, len(values) // 10)
    if not name.startswith("train/") or width < 2:
        return curve
    smooth = np.convolve(values, np.full(width, 1 / width), mode="valid")
    first = (width - 1) // 2
    return steps[first : first + len(smooth)], smooth.tolist()
