"""Figures of an autoencoder's latents: spectra, channel values, a PCA baseline, and the effect of each channel."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import norm
from torch import Tensor

from ldm.image_grid import labelled_rows, to_pil

INK, SIGNAL, MARK = "#333333", "#2f6fb0", "#c9782c"
FLOOR = 1e-6
"""Eigenvalues below this fraction of the largest eigenvalue are not plotted."""


def plot_latents(content: dict[str, Any], z_raw: Tensor) -> Figure:
    """Plot the spectra across channels and of full latents, the PCA curve, and histograms of channel values.

    Args:
        content: The content of latents_report.json.
        z_raw: One posterior sample per image, [n, C, h, w].
    """
    figure = Figure(figsize=(10, 8.4), dpi=130, layout="constrained")
    channels, latents, distortion, histogram = figure.subplots(2, 2).flat
    _plot_spectrum(channels, content["spectrum"]["channels"], "across channels")
    _plot_spectrum(latents, content["spectrum"]["latents"], "full latents")
    _plot_distortion(distortion, content["held_out"], content["latent_shape"][0])
    _plot_histogram(histogram, content["channels"], z_raw)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
    shape = " x ".join(map(str, content["latent_shape"]))
    figure.suptitle(f"{shape} latents of {content['num_images']} images from {content['images']}", fontsize=12)
    return figure


def _plot_spectrum(axes: Axes, spectrum: dict[str, Any], title: str) -> None:
    """Plot the eigenvalues, the effective rank, and how many components contain 90, 95 and 99% of the variance."""
    eigenvalues, rank = spectrum["eigenvalues"], spectrum["effective_rank"]
    axes.plot(range(1, len(eigenvalues) + 1), eigenvalues, ".-", color=SIGNAL)
    axes.axvline(rank, color=MARK, ls="--", label=f"effective rank {rank:.1f} of {len(eigenvalues)}")
    for share, count in spectrum["components"].items():
        axes.axvline(count, color=INK, lw=0.8, ls=":", label=f"{float(share):.0%} of variance: {count}")
    if eigenvalues[0] > 0:
        axes.set(yscale="log", ylim=(max(FLOOR * eigenvalues[0], min(eigenvalues) / 2), 3 * eigenvalues[0]))
    axes.set(xlabel="component", ylabel="eigenvalue", title=f"Signal spectrum, {title}")


def _plot_distortion(axes: Axes, held_out: dict[str, Any], channels: int) -> None:
    """Plot PSNR against the number of channels for lossy PCAs and for the autoencoder."""
    counts, curve = held_out["pca_curve"]["channels"], held_out["pca_curve"]["psnr_db"]
    psnr_db = held_out["psnr_db"]
    axes.plot(counts[:-1], curve[:-1], ".-", color=SIGNAL, label="PCA of patches")
    axes.plot(channels, psnr_db, "*", color=MARK, ms=16, label=f"autoencoder, {psnr_db:.1f} dB")
    axes.vlines(channels, *sorted((psnr_db, held_out["pca_psnr_db"])), color=MARK, lw=1, ls=":")
    axes.set(xlabel="channels (values per patch)", ylabel="PSNR (dB)", xlim=(0, counts[-1]))
    axes.set_title(f"Distortion, {held_out['num_images']} held-out images; PCA with {counts[-1]} channels is lossless")


def _plot_histogram(axes: Axes, channels: list[dict[str, Any]], z_raw: Tensor) -> None:
    """Plot histograms of the channels with the most, the median and the least information, and the N(0, 1) prior."""
    order = sorted(channels, key=lambda row: row["information_bits"], reverse=True)
    x = np.linspace(-5, 5, 400)
    axes.fill_between(x, norm.pdf(x), color="#dddddd", lw=0, label="N(0, 1)")
    for i, name in ((0, "most information"), (len(order) // 2, "median information"), (-1, "least information")):
        channel = order[i]["channel"]
        values, label = z_raw[:, channel].flatten().numpy(), f"channel {channel}, {name}"
        axes.hist(values, bins=160, density=True, histtype="step", label=label)
    axes.set(xlabel="z_raw", ylabel="density", yscale="log", ylim=(1e-4, 200), title="Distribution of channel values")


def plot_channels(content: dict[str, Any], decoded: dict[int, Tensor], shifts: Sequence[float]) -> Image.Image:
    """Plot one row per channel: each image, decoded with this channel shifted by each of `shifts` standard deviations.

    Args:
        decoded: Decoded images by channel, [k, len(shifts), 3, H, W] in [-1, 1].
    """
    rows = []
    for channel, images in decoded.items():
        statistics = content["channels"][channel]
        rate = "dead" if statistics["dead"] else f"{statistics['kl_bits']:.0f} bits"
        rows.append((f"channel {channel}, {rate}, std {statistics['std']:.2f}", to_pil(images.flatten(0, 1))))
    captions = [f"{shift:+g} std" for shift in shifts] * len(next(iter(decoded.values())))
    return labelled_rows(rows, captions=captions, cell=64)
