"""Figure of a latent size sweep: distortion against size and rate, with PCA baselines."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ldm.evaluation.curves import COLOURS

INK = "#333333"
MARKERS = {"plain": "o", "adversarial": "D"}
LABELS = {"num_values": "values per image", "kl_bits": "rate (KL, bits per image)"}


def plot_size_sweep(report: Mapping[str, Any]) -> Figure:
    """Plot PSNR against values per image and, if all rows have a KL rate, against bits per image.

    If stage 2 was trained, also plot the KD of samples against values per image.

    Args:
        report: The "report" entry of sweep.json.
    """
    rows = sorted(report["rows"], key=lambda row: row["psnr_db"])
    factors = sorted({row["factor"] for row in rows})
    colours = dict(zip(factors, cycle(COLOURS), strict=False))
    keys = [key for key in LABELS if all(row[key] is not None for row in rows)]
    with_samples = all(row.get("kd_samples") is not None for row in rows)
    num_panels = len(keys) + with_samples
    figure = Figure(figsize=(5.4 * num_panels, 5.4), dpi=130, layout="constrained")
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=False):
        _plot_distortion(axes, rows, key, report, colours)
    if with_samples:
        _plot_samples(panels[-1], rows, report, colours)
    size_axes = figure.axes[0]
    for factor, colour in colours.items():
        curve = report["pca"][str(factor)]
        size_axes.plot(curve["num_values"], curve["psnr_db"], color=colour, scaley=False, label=f"PCA, f = {factor}")
    for loss, marker in MARKERS.items():
        size_axes.plot([], [], marker, color=INK, label=f"autoencoder, {loss} loss")
    size_axes.legend(frameon=False, fontsize=9, loc="upper left")
    figure.suptitle(f"{report['num_images']} held-out images from {report['images']}, {report['resolution']} px")
    return figure


def _plot_distortion(
    axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, report: Mapping[str, Any], colours: dict[int, str]
) -> None:
    """Plot the PSNR of each run, in ascending order, and the target."""
    _plot_runs(axes, rows, key, "psnr_db", report, colours)
    low, high = axes.get_ylim()
    low = min(low, *(row["pca_psnr_db"] for row in rows))
    axes.set(ylim=(low - 1, high + 1), ylabel="PSNR (dB)")
    axes.axhline(report["target_psnr_db"], color=INK, lw=1, ls="--")
    axes.set_title(f"Distortion (dashed line: target of {report['target_psnr_db']:g} dB)")


def _plot_samples(
    axes: Axes, rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any], colours: dict[int, str]
) -> None:
    rows = sorted(rows, key=lambda row: row["kd_samples"])
    _plot_runs(axes, rows, "num_values", "kd_samples", report, colours)
    axes.set(ylabel="KD")
    axes.set_title(f"Samples, N = {report['num_samples']}, after {rows[0]['stage_2_minutes']:.1f} minutes of stage 2")


def _plot_runs(
    axes: Axes, rows: Sequence[Mapping[str, Any]], x: str, y: str, report: Mapping[str, Any], colours: dict[int, str]
) -> None:
    """Plot a metric of each run with its standard error, and a ring around the recommended run.

    Args:
        rows: Rows in ascending order of y, so that the labels of neighbouring points are on opposite sides.
    """
    for i, row in enumerate(rows):
        point, colour = (row[x], row[y]), colours[row["factor"]]
        axes.errorbar(*point, row[f"{y}_standard_error"], color=colour, marker=MARKERS[row["loss"]], capsize=2)
        if row["name"] == report["recommendation"]["name"]:
            axes.plot(*point, "o", ms=18, mfc="none", mec=INK)
        side, offset = ("left", 12) if i % 2 else ("right", -12)
        axes.annotate(row["size"], point, (offset, 0), textcoords="offset points", color=colour, ha=side, va="center")
    values = [row[x] for row in rows]
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.set(xlim=(min(values) / 2.2, 2.2 * max(values)), xlabel=LABELS[x])
    axes.grid(alpha=0.22)
