"""How a training of stage 1 went: distortion by step, and the discriminator's game where there was one."""

import csv
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from ldm.errors import UserError
from ldm.files.untrusted import first_line

INK, HELD_OUT, TRAINED, GAME, RIGHT = "#333333", "#0072B2", "#8a8a8a", "#D55E00", "#009E73"

PANELS = (
    ("Distortion", ("val/psnr_db", "held-out PSNR, dB", HELD_OUT), ("train/l1", "l1 of training batches", TRAINED)),
    (
        "Adversarial training",
        ("train/adaptive_weight", "adaptive weight lambda", GAME),
        ("train/discriminator_accuracy", "discriminator's accuracy", RIGHT),
    ),
)
"""Pairs of curves of different units over the same steps, each with an axis in its colour."""

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


def plot_training(curves: dict[str, Curve], title: str) -> Figure:
    """Held-out PSNR over the training loss; lambda and the discriminator's accuracy beside them.

    Args:
        curves: Of `read_curves`; those that a run has not are left out.
    """
    played = "train/adversarial" in curves
    figure = Figure(figsize=(11 if played else 6, 3.8), layout="constrained")
    for axes, (of, *pair) in zip(figure.subplots(1, 1 + played, squeeze=False)[0], PANELS, strict=False):
        axes.set_title(of, fontsize=11)
        axes.set_xlabel("generator step")
        for place, (name, label, colour) in zip((axes, axes.twinx()), pair, strict=True):
            if name in curves:
                place.plot(*curves[name], ".-", color=colour, linewidth=1.4)
            place.set_ylabel(label, color=colour)
            place.tick_params(axis="y", colors=colour)
        if played:
            axes.axvline(curves["train/adversarial"][0][0], color=INK, linewidth=1, linestyle=":")
    figure.suptitle(f"{title}{'; dotted: the discriminator begins' * played}", fontsize=12)
    return figure
