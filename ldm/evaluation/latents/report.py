"""Report on the number of latent dimensions that a run's images need: metrics, figures and one recommendation."""

import time
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.data.images import ImageData
from ldm.errors import UserError
from ldm.evaluation.image_sets import spaced_val_indices, track_batches
from ldm.evaluation.latents.figure import plot_channels, plot_latents
from ldm.latents import spectrum
from ldm.latents.spectrum import ChannelStatistics, channel_statistics
from ldm.metrics.image import fold, patch_components, psnr, unfold
from ldm.metrics.report import Report
from ldm.progress import track
from ldm.rules import Count, checked
from ldm.runs.run import Run, choose_images
from ldm.runtime.random import torch_generator

SHARES = (0.9, 0.95, 0.99)
"""Shares of the variance for which the number of components is reported."""
MAX_PCA_IMAGES, MAX_HELD_OUT_IMAGES = 4096, 512
"""Maximum number of training images for fitting a PCA and of validation images for measuring PSNR, from the start of
each split. The PSNR in run.json is measured on the same validation images."""
NUM_SHIFTED_IMAGES, NUM_SHIFTED_CHANNELS = 4, 24
"""Number of images, and maximum number of channels, in the figure of shifted channels."""
SHIFTS = (-2.0, 0.0, 2.0)
"""Shifts of a channel in the figure, in standard deviations."""
COLUMNS = {
    "kl_bits": ("KL, bits/image", ".1f"),
    "information_bits": ("information bound, bits/image", ".1f"),
    "mean": ("mean", ".3f"),
    "std": ("std", ".3f"),
    "signal_share": ("signal share", ".3f"),
}
"""Statistics of a channel, with their column titles and number formats."""


def latent_table(content: dict[str, Any]) -> Table:
    """Return a table with the statistics of each channel."""
    channels, height, width = content["latent_shape"]
    title = f"{channels} channels of {height} x {width}, {content['num_images']} images from {content['images']}"
    table = Table(title=title, title_justify="left")
    for name in ("channel", *(label for label, _ in COLUMNS.values()), "dead?"):
        table.add_column(name, justify="right")
    for row in content["channels"]:
        numbers = (f"{row[key]:{spec}}" for key, (_, spec) in COLUMNS.items())
        table.add_row(str(row["channel"]), *numbers, "[bold red]dead[/bold red]" if row["dead"] else "")
    table.add_section()
    table.add_row("all", *(f"{content[key]:.1f}" for key in ("kl_bits", "information_bits")))
    return table


def latent_lines(content: dict[str, Any]) -> list[str]:
    """Return the spectra, the PSNR and the recommendation as text. docs/latent_size.md explains them."""
    held_out = content["held_out"]
    return [
        *(
            f"{name}: effective rank {values['effective_rank']:.1f} of {len(values['eigenvalues'])}; "
            f"{values['components']['0.99']} components contain 99% of the variance"
            for name, values in content["spectrum"].items()
        ),
        f"{held_out['num_images']} held-out images: PSNR {held_out['psnr_db']:.2f} dB; a PCA of the same size reaches "
        f"{held_out['pca_psnr_db']:.2f} dB and needs {held_out['pca_channels_of_equal_psnr']} channels for equal PSNR",
        f"Recommendation: {content['recommendation']['text']}",
    ]


@checked
def measure_latents(
    run: Run,
    *,
    device: torch.device,
    split: str = "train",
    num_images: int = 2048,
    seed: int = 0,
    batch_size: Count = 64,
) -> Report:
    """Measure the latents of a run's images, for a run of either stage.

    Args:
        split: "val" or "train". PSNR is always measured on validation images.
        num_images: Maximum number of images; the seed determines which images are used.

    Raises:
        UserError: As raised by `choose_images`, or if the autoencoder predicts no variance or its latents are not
            finite.
    """
    started = time.perf_counter()
    images, indices = choose_images(run, split, num_images, seed)
    autoencoder = run.autoencoder().to(device)
    if not autoencoder.has_density:
        raise UserError(
            f"The autoencoder {type(autoencoder.model).__name__} of {run.path} predicts no variance, so its rate "
            "cannot be measured. Set run= to a run trained with regulariser=kl."
        )
    batches = track_batches(images, indices, batch_size, "encoding images (batches)")
    encoded = (torch.stack(autoencoder.encode(batch), dim=1) for batch in batches)
    moments = torch.cat([batch.float().cpu() for batch in encoded])
    require_finite(moments, "latents")
    mean, log_variance = moments.unbind(1)
    distortion = _measure_distortion(autoencoder, images, batch_size)
    statistics = channel_statistics(mean, log_variance)
    decoded = _decode_shifted(autoencoder, images, statistics)
    spectra = {
        "channels": _spectrum(spectrum.channel_spectrum(mean, statistics.std)),
        "latents": _spectrum(spectrum.latent_spectrum(mean, statistics.std)),
    }
    pca = dict(zip(*distortion["pca_curve"].values(), strict=True))
    dead_channels = statistics.dead_channels
    advice = spectrum.recommend(dead_channels, spectra["channels"], pca, distortion["psnr_db"], autoencoder.channels)
    columns = {name: getattr(statistics, name).tolist() for name in COLUMNS}
    content: dict[str, Any] = {
        "run": str(run.path),
        "images": f"{images.name}/{split}@{images.fingerprint[:8]}",
        "num_images": len(indices),
        "seed": seed,
        "latent_shape": list(mean.shape[1:]),
        "factor": autoencoder.factor,
        "kl_bits": statistics.kl_bits.sum().item(),
        "information_bits": statistics.information_bits.sum().item(),
        "dead_below_nats_per_location": spectrum.DEAD_NATS,
        "dead": dead_channels,
        "channels": [
            {"channel": i, **{name: values[i] for name, values in columns.items()}, "dead": i in dead_channels}
            for i in range(autoencoder.channels)
        ],
        "spectrum": spectra,
        "held_out": distortion,
        "recommendation": advice,
        "seconds": round(time.perf_counter() - started, 1),
    }
    noise = torch.randn(mean.shape, generator=torch_generator(seed, 4))
    figures: dict[str, Any] = {
        "latents.png": plot_latents(content, mean + (0.5 * log_variance).exp() * noise),
        "latents_channels.png": plot_channels(content, decoded, SHIFTS),
    }
    return Report("latents_report.json", content, latent_table(content), latent_lines(content), figures)


def _measure_distortion(autoencoder: Autoencoder, images: ImageData, batch_size: int) -> dict[str, Any]:
    """Measure the PSNR of held-out images for the autoencoder and for PCAs with various numbers of components."""
    held_out, factor = images.val_indices[:MAX_HELD_OUT_IMAGES], autoencoder.factor
    batches = track_batches(images, held_out, batch_size, "held-out images (batches)")
    values = torch.cat([psnr(batch, autoencoder.decode(autoencoder.encode(batch)[0]).cpu()) for batch in batches])
    psnr_db, counts = values.mean().item(), spectrum.pca_counts(3 * factor**2, autoencoder.channels)
    curve = held_out_pca(images, held_out, factor, counts, batch_size)
    pca = dict(zip(counts, curve, strict=True))
    return {
        "num_images": len(held_out),
        "psnr_db": psnr_db,
        "pca_psnr_db": pca[min(autoencoder.channels, max(counts))],
        "pca_channels_of_equal_psnr": next((n for n, value in pca.items() if value >= psnr_db), max(counts)),
        "pca_curve": {"channels": counts, "psnr_db": curve},
    }


def held_out_pca(
    images: ImageData, indices: np.ndarray, factor: int, counts: list[int], batch_size: int
) -> list[float]:
    """Return the mean PSNR in dB of a PCA of f x f patches, fitted to training images, for each component count."""
    train = np.sort(images.train_indices[:MAX_PCA_IMAGES])
    title = f"PCA with f = {factor} (batches)"
    components = patch_components(track_batches(images, train, batch_size, title), factor)
    batches = track_batches(images, indices, batch_size, title)
    return torch.cat([pca_curve(components, batch, factor, counts) for batch in batches], dim=1).mean(1).tolist()


def _decode_shifted(autoencoder: Autoencoder, images: ImageData, statistics: ChannelStatistics) -> dict[int, Tensor]:
    """Decode images with one channel shifted, for each of the most informative channels."""
    channels = statistics.information.argsort(descending=True)[:NUM_SHIFTED_CHANNELS].sort().values.tolist()
    mean = autoencoder.encode(images.batch(spaced_val_indices(images, NUM_SHIFTED_IMAGES)))[0]
    return {
        channel: shift_channel(autoencoder, mean, channel, statistics.std[channel].item())
        for channel in track(channels, "decoding shifted channels")
    }


def require_finite(values: Tensor, name: str) -> None:
    """Raise an error if the outputs of an autoencoder are not finite.

    Args:
        values: Outputs, one row per image.
        name: Name of the outputs, used in the message.

    Raises:
        UserError: If any value is not finite.
    """
    if num_invalid := int((~values.flatten(1).isfinite().all(1)).sum()):
        raise UserError(
            f"The autoencoder's {name} for {num_invalid} of {len(values)} images are not finite, because training "
            "diverged. Train the autoencoder again with a lower optimizer.lr."
        )


def shift_channel(autoencoder: Autoencoder, mean: Tensor, channel: int, std: float) -> Tensor:
    """Shift one channel of latents [k, C, h, w] by each of SHIFTS times std, and decode to [k, 3, 3, H, W]."""
    z_raw = mean[:, None].repeat(1, len(SHIFTS), 1, 1, 1)
    z_raw[:, :, channel] += std * torch.tensor(SHIFTS, device=mean.device)[:, None, None]
    return autoencoder.decode(z_raw.flatten(0, 1)).float().cpu().unflatten(0, z_raw.shape[:2])


def pca_curve(components: tuple[Tensor, Tensor], images: Tensor, factor: int, counts: list[int]) -> Tensor:
    """Return the PSNR in dB of images [b, 3, H, W] for each number of PCA components, [len(counts), b].

    The values equal the PSNR of `pca_reconstruction`, but all counts share one decomposition.

    Args:
        components: Mean and basis, as returned by `patch_components`.
        counts: Numbers of components in ascending order.
    """
    mean, basis = components
    coefficients = (unfold(images, factor) - mean) @ basis
    values, patches, start = [], mean.expand_as(coefficients), 0
    for count in counts:
        patches = patches + coefficients[..., start:count] @ basis[:, start:count].T
        values.append(psnr(images, fold(patches, factor).clamp(-1, 1)))
        start = count
    return torch.stack(values)


def _spectrum(eigenvalues: Tensor) -> dict[str, Any]:
    return {
        "effective_rank": spectrum.effective_rank(eigenvalues),
        "participation_ratio": spectrum.participation_ratio(eigenvalues),
        "components": {str(share): spectrum.num_components(eigenvalues, share) for share in SHARES},
        "eigenvalues": eigenvalues.tolist(),
    }
