"""The latents of an autoencoder as pictures: spectra, channels and PCA in one, and what each channel does to images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import norm
from torch import Tensor

from ldm.image_grid import rows, to_pil

INK, SIGNAL, MARK = "#333333", "#2f6fb0", "#c9782c"
FLOOR = 1e-6
"""Eigenvalues below this share of the largest are not drawn."""


def plot_latents(content: dict[str, Any], z_raw: Tensor) -> Figure:
    """Spectra between channels and of whole latents, the PCA curve, histograms of channels.

    Args:
        content: As latents_report.json has them.
        z_raw: One draw per image, [n, C, h, w].
    """
    figure = Figure(figsize=(10, 8.4), dpi=130, layout="constrained")
    between, whole, distortion, histogram = figure.subplots(2, 2).flat
    _plot_spectrum(between, content["spectrum"]["channels"], "between channels")
    _plot_spectrum(whole, content["spectrum"]["latents"], "whole latents")
    _plot_distortion(distortion, content["held_out"], content["latent_shape"][0])
    _plot_histogram(histogram, content["channels"], z_raw)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
    shape = " x ".join(map(str, content["latent_shape"]))
    figure.suptitle(f"{content['images']}, {content['num_images']} images: latents of {shape}", fontsize=12)
    return figure


def _plot_spectrum(axes: Axes, spectrum: dict[str, Any], of: str) -> None:
    """Eigenvalues on a log axis, with the effective rank, and what 90, 95 and 99 % of the variance need."""
    eigenvalues, rank = spectrum["eigenvalues"], spectrum["effective_rank"]
    axes.plot(range(1, len(eigenvalues) + 1), eigenvalues, ".-", color=SIGNAL)
    axes.axvline(rank, color=MARK, ls="--", label=f"effective rank {rank:.1f} of {len(eigenvalues)}")
    for share, count in spectrum["components"].items():
        axes.axvline(count, color=INK, lw=0.8, ls=":", label=f"{float(share):.0%} of the variance: {count}")
    if eigenvalues[0] > 0:
        axes.set(yscale="log", ylim=(max(FLOOR * eigenvalues[0], min(eigenvalues) / 2), 3 * eigenvalues[0]))
    axes.set(xlabel="component", ylabel="eigenvalue", title=f"Spectrum of the signal, {of}")


def _plot_distortion(axes: Axes, held_out: dict[str, Any], channels: int) -> None:
    """PSNR of a PCA over its channels, less the one that loses nothing, and the autoencoder's."""
    counts, curve = held_out["pca_curve"]["channels"], held_out["pca_curve"]["psnr_db"]
    psnr_db = held_out["psnr_db"]
    axes.plot(counts[:-1], curve[:-1], ".-", color=SIGNAL, label="PCA of patches")
    axes.plot(channels, psnr_db, "*", color=MARK, ms=16, label=f"autoencoder, {psnr_db:.1f} dB")
    axes.vlines(channels, *sorted((psnr_db, held_out["pca_psnr_db"])), color=MARK, lw=1, ls=":")
    axes.set(xlabel="channels: values per patch", ylabel="PSNR, dB", xlim=(0, counts[-1]))
    axes.set_title(f"{held_out['num_images']} held-out images; a PCA of {counts[-1]} channels loses nothing")


def _plot_histogram(axes: Axes, channels: list[dict[str, Any]], z_raw: Tensor) -> None:
    """The channels with the most, the median and the least information, beside the prior that the KL asks for."""
    order = sorted(channels, key=lambda row: row["information_bits"], reverse=True)
    x = np.linspace(-5, 5, 400)
    axes.fill_between(x, norm.pdf(x), color="#dddddd", lw=0, label="N(0, 1)")
    for i, name in ((0, "most"), (len(order) // 2, "median"), (-1, "least")):
        channel = order[i]["channel"]
        values, label = z_raw[:, channel].flatten().numpy(), f"channel {channel}, {name} information"
        axes.hist(values, bins=160, density=True, histtype="step", label=label)
    axes.set(xlabel="z_raw", ylabel="density", yscale="log", ylim=(1e-4, 200), title="Values of single channels")


def plot_channels(content: dict[str, Any], moved: dict[int, Tensor], moves: Sequence[float]) -> Image.Image:
    """A row per channel; for each image, the same channel moved by each of `moves` standard deviations everywhere.

    Args:
        moved: By channel, [k, len(moves), 3, H, W] in [-1, 1].
    """
    named = []
    for channel, images in moved.items():
        held = content["channels"][channel]
        name = f"channel {channel}, {'dead' if held['dead'] else format(held['kl_bits'], '.0f') + ' bits'}"
        named.append((f"{name}, std {held['std']:.2f}", to_pil(images.flatten(0, 1))))
    captions = [f"{by:+g} std" for by in moves] * len(next(iter(moved.values())))
    return rows(named, captions=captions, cell=64)
