"""The latents of an autoencoder as pictures: spectra, channels and PCA in one, and what each channel does to images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.image_grid import INK as PEN
from ldm.image_grid import MARGIN, PAPER, to_pil

INK, SIGNAL, MARK, DEAD, NOISE = "#333333", "#2f6fb0", "#c9782c", "#c0392b", "#a9c3de"
HISTOGRAM_COLOURS = ("#0072B2", "#E69F00", "#009E73")
FLOOR = 1e-6
"""Eigenvalues below this share of the largest are not drawn."""
CELL, GUTTER, HEADER, GAP = 64, 150, 26, 14


def plot_latents(content: dict[str, Any], z_raw: Tensor) -> Figure:
    """Spectra between channels and of whole latents, the PCA curve; KL, std and histograms of channels.

    Args:
        content: As latents_report.json has them.
        z_raw: One draw per image, [n, C, h, w].
    """
    figure = Figure(figsize=(15, 8.4), layout="constrained")
    (between, whole, distortion), (rate, spread, histogram) = figure.subplots(2, 3)
    _plot_spectrum(between, content["spectrum"]["channels"], "between channels", "component of the channels")
    _plot_spectrum(whole, content["spectrum"]["latents"], "whole latents", "component of the latent")
    _plot_distortion(distortion, content["held_out"], content["latent_shape"][0])
    _plot_rate(rate, content)
    _plot_spread(spread, content)
    _plot_histogram(histogram, content, z_raw)
    for axes in (between, whole, distortion, rate, spread, histogram):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    shape = " x ".join(map(str, content["latent_shape"]))
    figure.suptitle(f"{content['images']}, {content['num_images']} images: latents of {shape}", fontsize=12)
    return figure


def _plot_spectrum(axes: Axes, spectrum: dict[str, Any], of: str, what: str) -> None:
    """Eigenvalues on a log axis, with the effective rank, and what 90, 95 and 99 % of the variance need."""
    eigenvalues = np.array(spectrum["eigenvalues"])
    rank, components = spectrum["effective_rank"], spectrum["components"]
    shown = eigenvalues[eigenvalues > FLOOR * eigenvalues[0]]
    many = len(eigenvalues) > 40
    axes.plot(np.arange(1, len(shown) + 1), shown, "-" if many else "o-", color=SIGNAL, lw=1.5, ms=5)
    axes.axvline(rank, color=MARK, lw=1.5, ls="--", label=f"effective rank {rank:.1f} of {len(eigenvalues)}")
    for i, count in enumerate(sorted({*components.values()} - {0})):
        axes.plot(count, eigenvalues[count - 1], "|", color=INK, ms=14, mew=1.5)
        names = ", ".join(f"{float(share):.0%}" for share, of_it in components.items() if of_it == count)
        _annotate(axes, names, (count, eigenvalues[count - 1]), INK, -20 if i % 2 else 11)
    if len(shown):
        axes.set(yscale="log", ylim=(min(shown[-1] / 2, shown[0] / 30), 3 * shown[0]))
    axes.set(xlabel=what, ylabel="eigenvalue", xlim=(0 if many else 0.5, len(eigenvalues) + 0.5))
    axes.set_title(f"Spectrum of the signal, {of}")
    axes.legend(frameon=False, fontsize=9)
    axes.grid(alpha=0.25)


def _plot_distortion(axes: Axes, held_out: dict[str, Any], channels: int) -> None:
    """PSNR of a PCA over its channels, less the one that loses nothing, and the autoencoder's."""
    counts, curve = held_out["pca_curve"]["channels"], held_out["pca_curve"]["psnr_db"]
    psnr_db = held_out["psnr_db"]
    axes.plot(counts[:-1], curve[:-1], ".-", color=SIGNAL, lw=1.5, ms=4, label="PCA of patches")
    axes.plot(channels, psnr_db, "*", color=MARK, ms=16, label=f"autoencoder, {psnr_db:.1f} dB")
    axes.vlines(channels, *sorted((psnr_db, held_out["pca_psnr_db"])), color=MARK, lw=1, ls=":")
    axes.set(xlabel="channels: values per patch", ylabel="PSNR, dB", xlim=(0, counts[-1]))
    axes.set_title(f"{held_out['num_images']} held-out images; a PCA of {counts[-1]} channels loses nothing")
    axes.legend(frameon=False, fontsize=9, loc="upper left", markerscale=0.6)
    axes.grid(alpha=0.25)


def _plot_rate(axes: Axes, content: dict[str, Any]) -> None:
    rows = content["channels"]
    axes.bar([r["channel"] for r in rows], [r["kl_bits"] for r in rows], color=_colours(rows, SIGNAL))
    for row in rows:
        left = row["channel"] - 0.4
        axes.hlines(row["information_bits"], left, left + 0.8, color=INK, lw=1.5)
        if row["dead"]:
            _annotate(axes, "dead", (row["channel"], row["kl_bits"]), DEAD, 3)
    axes.set(xlabel="channel", ylabel="bits per image")
    axes.set_title(f"KL to N(0, I), in all {content['kl_bits']:.0f} bits; line: information at most")
    _number_channels(axes, rows)


def _plot_spread(axes: Axes, content: dict[str, Any]) -> None:
    """Std of z_raw, and in front of it that of the noise: their squares differ by the variance of the signal."""
    rows, places = content["channels"], [row["channel"] for row in content["channels"]]
    axes.bar(places, [r["std"] for r in rows], color=_colours(rows, SIGNAL), label="z_raw")
    noise = [r["std"] * max(0.0, 1 - r["signal_share"]) ** 0.5 for r in rows]
    axes.bar(places, noise, width=0.5, color=NOISE, label="its noise around the means")
    axes.axhline(1, color=INK, lw=0.8, ls="--")
    axes.set(xlabel="channel", ylabel="standard deviation")
    axes.set_ylim(0, 1.25 * max(1.0, *(r["std"] for r in rows)))
    axes.set_title("Spread of each channel; dashed: N(0, 1)")
    axes.legend(frameon=False, fontsize=9, loc="upper right", ncols=2)
    _number_channels(axes, rows)


def _plot_histogram(axes: Axes, content: dict[str, Any], z_raw: Tensor) -> None:
    """The channels with the most, the median and the least information, beside the prior that the KL asks for."""
    order = sorted(content["channels"], key=lambda row: row["information_bits"], reverse=True)
    chosen = {order[i]["channel"]: name for i, name in ((-1, "least"), (len(order) // 2, "median"), (0, "most"))}
    reach = max(4.0, *(abs(row["mean"]) + 4 * row["std"] for row in order if row["channel"] in chosen))
    x = np.linspace(-reach, reach, 400)
    axes.fill_between(x, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), color="#dddddd", lw=0, label="N(0, 1)")
    for (channel, name), colour in zip(reversed(chosen.items()), HISTOGRAM_COLOURS, strict=False):
        heights, edges = np.histogram(
            z_raw[:, channel].flatten().numpy(), bins=160, range=(-reach, reach), density=True
        )
        axes.stairs(heights, edges, color=colour, lw=1.4, label=f"channel {channel}, {name} information")
    axes.set(xlabel="z_raw", ylabel="density", yscale="log", xlim=(-reach, reach), ylim=(1e-4, 200))
    axes.set_title("Values of single channels")
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def _colours(rows: list[dict[str, Any]], alive: str) -> list[str]:
    return [DEAD if row["dead"] else alive for row in rows]


def _annotate(axes: Axes, text: str, point: tuple[float, float], colour: str, above: float) -> None:
    axes.annotate(text, point, (0, above), textcoords="offset points", ha="center", fontsize=8, color=colour)


def _number_channels(axes: Axes, rows: list[dict[str, Any]]) -> None:
    step = max(1, len(rows) // 16)
    axes.set_xticks(range(0, len(rows), step))
    axes.set_xlim(-0.7, len(rows) - 0.3)


def plot_channels(content: dict[str, Any], moved: dict[int, Tensor], moves: Sequence[float]) -> Image.Image:
    """A row per channel; for each image, the same channel moved by each of `moves` standard deviations everywhere.

    Args:
        moved: By channel, [k, len(moves), 3, H, W] in [-1, 1].
    """
    num_images = len(next(iter(moved.values())))
    group = len(moves) * (CELL + 2) + GAP
    size = (GUTTER + num_images * group, 2 * HEADER + len(moved) * (CELL + MARGIN) + MARGIN)
    canvas = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    of = f", the {len(moved)} with the most information" if len(moved) < len(content["channels"]) else ""
    title = f"Each channel of the mean latent moved everywhere by so many of its standard deviations{of}"
    pen.text((MARGIN, MARGIN), title, fill=PEN, font=ImageFont.load_default(14))
    for image in range(num_images):
        for column, by in enumerate(moves):
            middle = GUTTER + image * group + column * (CELL + 2) + CELL // 2
            pen.text((middle, HEADER + 14), f"{by:+g}" if by else "0", fill=PEN, font=font, anchor="mm")
    for row, (channel, images) in enumerate(moved.items()):
        top = 2 * HEADER + row * (CELL + MARGIN)
        held = content["channels"][channel]
        colour = DEAD if held["dead"] else PEN
        words = (
            f"channel {channel}{', dead' if held['dead'] else ''}\n{held['kl_bits']:.0f} bits, std {held['std']:.2f}"
        )
        pen.multiline_text((MARGIN, top + CELL // 2), words, fill=colour, font=font, anchor="lm", spacing=4)
        for image, group_of in enumerate(images):
            for column, picture in enumerate(to_pil(group_of)):
                left = GUTTER + image * group + column * (CELL + 2)
                canvas.paste(picture.resize((CELL, CELL), Image.Resampling.BICUBIC), (left, top))
    return canvas
