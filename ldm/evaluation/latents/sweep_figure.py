"""Rate and distortion of the latent sizes of a sweep, beside the PCA of every size, and the FD of each run."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.patheffects as effects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

INK, FAINT, RING = "#333333", "#8a8a8a", "#111111"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""By f, in ascending order; readable without telling red from green (Okabe and Ito 2008)."""
MARKERS = ("o", "D", "^", "s")
PLACES = ((9, 0), (-9, 0), (0, 10), (0, -10), (9, 9), (-9, 9), (9, -9), (-9, -9), (16, 16), (-16, 16), (16, -16))
"""Where a label may stand beside its point, in typographic points, in the order of preference."""

APART = 1.06
"""Sizes of equally many values are drawn this factor apart."""


def plot_size_sweep(report: Mapping[str, Any]) -> Figure:
    """PSNR over values per image, and over bits per image where latents have a density; FD by run, where measured.

    Args:
        report: That of sweep.json.
    """
    rows = _spread_equal_sizes(report["rows"])
    with_rate = [row for row in rows if row["kl_bits"] is not None]
    with_fd = [row for row in rows if row["fd"] is not None]
    widths = [1.15, *([1.0] if with_rate else []), *([0.75] if with_fd else [])]
    figure = Figure(figsize=(5.35 * sum(widths), 5.4), layout="constrained")
    size, *others = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    colours = dict(zip(sorted({row["factor"] for row in rows}), COLOURS * 2, strict=False))
    markers = dict(zip(dict.fromkeys(row["loss"] for row in rows), MARKERS, strict=False))
    _plot_by_size(size, rows, report, colours, markers)
    shown = [(size, "place", rows)]
    if with_rate:
        rate = others.pop(0)
        _plot_points(rate, with_rate, "kl_bits", report, colours, markers)
        rate.set(xlabel="rate: KL in bits per image", ylabel="PSNR, dB", title="Distortion by rate")
        _log_axis(rate, [row["kl_bits"] for row in with_rate])
        rate.set_ylim(size.get_ylim())
        shown.append((rate, "kl_bits", with_rate))
    if with_fd:
        _plot_fd(others[0], with_fd, report, colours, markers)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(11)
    side, images = report["resolution"], f"{report['num_images']} held-out images"
    figure.suptitle(f"Latent sizes for {side} x {side} px, {images} of {report['images']}", fontsize=13)
    figure.draw_without_rendering()  # the layout settles, and with it where labels collide
    for axes, key, drawn in shown:
        _label_points(axes, drawn, key, report["recommendation"]["name"], colours)
    return figure


def _spread_equal_sizes(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """With `place`, the values per image, and sizes of equally many a little apart."""
    sizes: dict[int, list[str]] = {}
    for row in rows:
        if row["size"] not in sizes.setdefault(row["num_values"], []):
            sizes[row["num_values"]].append(row["size"])
    found = []
    for row in rows:
        equal = sizes[row["num_values"]]
        away = equal.index(row["size"]) - (len(equal) - 1) / 2
        found.append({**row, "place": row["num_values"] * APART**away})
    return found


def _plot_by_size(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    report: Mapping[str, Any],
    colours: dict[int, str],
    markers: dict[str, str],
) -> None:
    pca = report["pca"]
    for factor, colour in colours.items():
        curve = pca[str(factor)]
        axes.plot(curve["num_values"], curve["psnr_db"], "-", color=colour, lw=1.6, alpha=0.75)
    for row in rows:
        axes.vlines(row["place"], *sorted((row["psnr_db"], row["pca_psnr_db"])), color=FAINT, lw=1, ls=":")
    _plot_points(axes, rows, "place", report, colours, markers)
    _log_axis(axes, [row["num_values"] for row in rows])
    top = max(row["psnr_db"] for row in rows) + 3  # a PCA that loses nothing would squash the rest
    around = [value for row in rows for value in (row["psnr_db"], min(row["pca_psnr_db"], top))]
    if min(around) - 6 < report["target_psnr_db"] < max(around) + 6:
        around.append(report["target_psnr_db"])
    margin = 0.12 * max(max(around) - min(around), 3)
    axes.set_ylim(min(around) - margin, max(around) + margin)
    together = any(row["place"] != row["num_values"] for row in rows)
    what = "values per image (sizes of equally many side by side)" if together else "values per image"
    axes.set(xlabel=what, ylabel="PSNR, dB", title="Distortion by size")
    chosen = report["recommendation"]["size"]
    axes.legend(
        handles=[
            *(Line2D([], [], color=colour, lw=1.6, label=f"PCA, f = {f}") for f, colour in colours.items()),
            *(
                Line2D([], [], color=INK, marker=m, ls="", ms=7, label=f"trained, {loss}")
                for loss, m in markers.items()
            ),
            Line2D([], [], color=RING, marker="o", ls="", ms=12, mfc="none", mew=1.4, label=f"recommended: {chosen}"),
        ],
        frameon=False,
        fontsize=9,
        loc="upper left",
    )


def _plot_points(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    key: str,
    report: Mapping[str, Any],
    colours: dict[int, str],
    markers: dict[str, str],
) -> None:
    """Every run with the standard error of its PSNR, and the target."""
    target, advice = report["target_psnr_db"], report["recommendation"]
    axes.axhline(target, color=FAINT, lw=1, ls="--")
    for row in rows:
        place = (row[key], row["psnr_db"])
        colour, error = colours[row["factor"]], row["psnr_db_standard_error"]
        axes.errorbar(*place, yerr=error, color=colour, capsize=2, elinewidth=1, zorder=3)
        axes.plot(*place, markers[row["loss"]], color=colour, ms=8, mec="white", mew=0.8, zorder=3)
        if row["name"] == advice["name"]:
            axes.plot(*place, "o", ms=16, mfc="none", mec=RING, mew=1.4, zorder=4)
    note = axes.text(0.995, target, f"target {target:g} dB", transform=axes.get_yaxis_transform(), fontsize=8)
    note.set(color=FAINT, ha="right", va="bottom", clip_on=True, in_layout=False)  # it may lie outside
    axes.grid(alpha=0.22)


def _plot_fd(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    report: Mapping[str, Any],
    colours: dict[int, str],
    markers: dict[str, str],
) -> None:
    """A line per run, the first at the top; what was trained on the same features is hollow."""
    for place, row in enumerate(reversed(rows)):
        colour, hollow = colours[row["factor"]], row["features_in_loss"]
        axes.hlines(place, 0, row["fd"], color=colour, lw=2.2, alpha=0.45)
        axes.plot(
            row["fd"], place, markers[row["loss"]], color=colour, ms=8, mfc="white" if hollow else colour, mew=1.5
        )
        axes.annotate(
            f"{row['fd']:.3g}", (row["fd"], place), (9, 0), textcoords="offset points", va="center", fontsize=9
        )
    names = [f"{row['size']} {row['loss']}" for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), names)
    axes.set_xlim(0, 1.2 * max(row["fd"] for row in rows) or 1)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="x", alpha=0.22)
    components = rows[0]["fd_components"]
    of = f", {components} components" if components else ""
    hollow = "\nhollow: with these features in the loss" if any(row["features_in_loss"] for row in rows) else ""
    axes.set(xlabel=f"FD ({report['features']}{of}){hollow}", title="Distance of the reconstructions")


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Plain numbers at 1, 2 and 5, and a margin of a factor around the values."""
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 2.2, max(values) * 2.2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _label_points(
    axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, recommended: str, colours: dict[int, str]
) -> None:
    """The size beside each point, where it covers neither a point nor another label."""
    taken, frame = [], axes.get_window_extent()
    for row, (x, y) in zip(rows, axes.transData.transform([(row[key], row["psnr_db"]) for row in rows]), strict=True):
        radius = 12 if row["name"] == recommended else 8
        taken.append(Bbox.from_extents(x - radius, y - radius, x + radius, y + radius))
    for row in rows:
        stroke = effects.withStroke(linewidth=3, foreground="white")
        style: dict[str, Any] = {"fontsize": 10, "color": colours[row["factor"]], "path_effects": [stroke], "zorder": 5}
        point, away = (row[key], row["psnr_db"]), 1.35 if row["name"] == recommended else 1.0
        note = axes.annotate(row["size"], point, (0, 0), textcoords="offset points", **style)
        for x, y in PLACES:
            note.set_position((away * x, away * y))
            note.set_horizontalalignment("left" if x > 0 else "right" if x < 0 else "center")
            note.set_verticalalignment("bottom" if y > 0 else "top" if y < 0 else "center")
            box = note.get_window_extent()
            inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
