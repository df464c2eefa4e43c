"""How many latent dimensions a run's images need: a table, words with one recommendation, a JSON and two pictures."""

import time
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.data.images import ImageData
from ldm.errors import UserError
from ldm.evaluation.image_sets import held_out_apart, track_batches
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
PCA_IMAGES, HELD_OUT = 4096, 512
"""The first training and validation images: those of the PSNR that training writes into run.json."""
MOVED_IMAGES, MOVED_CHANNELS = 4, 24
MOVES = (-2.0, 0.0, 2.0)
COLUMNS = {
    "kl_bits": ("KL, bits/image", ".1f"),
    "information_bits": ("information at most", ".1f"),
    "mean": ("mean", ".3f"),
    "std": ("std", ".3f"),
    "signal_share": ("signal share", ".3f"),
}
"""Of a channel, with their titles and forms."""


def latent_table(found: dict[str, Any]) -> Table:
    """What each channel holds."""
    channels, height, width = found["latent_shape"]
    title = f"{channels} channels of {height} x {width}, {found['num_images']} images of {found['images']}"
    table = Table(title=title, title_justify="left")
    for name in ("channel", *(label for label, _ in COLUMNS.values()), "dead?"):
        table.add_column(name, justify="right")
    for row in found["channels"]:
        numbers = (f"{row[key]:{form}}" for key, (_, form) in COLUMNS.items())
        table.add_row(str(row["channel"]), *numbers, "[bold red]dead[/bold red]" if row["dead"] else "")
    table.add_section()
    table.add_row("all", *(f"{found[key]:.1f}" for key in ("kl_bits", "information_bits")))
    return table


def latent_lines(found: dict[str, Any]) -> list[str]:
    """The spectra, the PSNR and the recommendation; docs/reading_the_numbers.md says what they mean."""
    held_out = found["held_out"]
    return [
        *(
            f"{name}: effective rank {of_it['effective_rank']:.1f} of {len(of_it['eigenvalues'])}, 99 % of "
            f"the variance in {of_it['components']['0.99']}"
            for name, of_it in found["spectrum"].items()
        ),
        f"{held_out['num_images']} held-out images: {held_out['psnr_db']:.2f} dB, a PCA of the same size "
        f"{held_out['pca_psnr_db']:.2f} dB, and as much with {held_out['pca_channels_of_equal_psnr']} channels",
        f"Recommendation: {found['recommendation']['text']}",
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
    """What the autoencoder of a run of either stage does with the run's images.

    Args:
        split: val or train; `num_images` of it at most, chosen by the seed. PSNR is always that of validation images.

    Raises:
        UserError: what `choose_images` refuses, an autoencoder without moments, latents that are not finite.
    """
    started = time.perf_counter()
    images, indices = choose_images(run, split, num_images, seed)
    autoencoder = run.autoencoder().to(device)
    if not autoencoder.has_density:
        raise UserError(
            f"The autoencoder {type(autoencoder.model).__name__} of {run.path} has points for latents, without the "
            "variance that a rate is measured by. Give run= a run with a KL."
        )
    parts = track_batches(images, indices, batch_size, "encoding, batches")
    encoded = (torch.stack(autoencoder.encode(part), dim=1) for part in parts)
    moments = torch.cat([part.float().cpu() for part in encoded])
    require_finite(moments, "latents")
    mean, log_variance = moments.unbind(1)
    distortion = _measure_distortion(autoencoder, images, batch_size)
    found = channel_statistics(mean, log_variance)
    moved = _move_channels(autoencoder, images, found)
    spectra = {
        "channels": _spectrum(spectrum.channel_spectrum(mean, found.std)),
        "latents": _spectrum(spectrum.latent_spectrum(mean, found.std)),
    }
    pca = dict(zip(*distortion["pca_curve"].values(), strict=True))
    advice = spectrum.recommend(found.dead, spectra["channels"], pca, distortion["psnr_db"], autoencoder.channels)
    of_channels = {name: getattr(found, name).tolist() for name in COLUMNS}
    content: dict[str, Any] = {
        "run": str(run.path),
        "images": f"{images.name}/{split}@{images.fingerprint[:8]}",
        "num_images": len(indices),
        "seed": seed,
        "latent_shape": list(mean.shape[1:]),
        "factor": autoencoder.factor,
        "kl_bits": found.kl_bits.sum().item(),
        "information_bits": found.information_bits.sum().item(),
        "dead_below_nats_per_location": spectrum.DEAD_NATS,
        "dead": found.dead,
        "channels": [
            {"channel": i, **{name: values[i] for name, values in of_channels.items()}, "dead": i in found.dead}
            for i in range(autoencoder.channels)
        ],
        "spectrum": spectra,
        "held_out": distortion,
        "recommendation": advice,
        "seconds": round(time.perf_counter() - started, 1),
    }
    noise = torch.randn(mean.shape, generator=torch_generator(seed, 4))
    pictures: dict[str, Any] = {
        "latents.png": plot_latents(content, mean + (0.5 * log_variance).exp() * noise),
        "latents_channels.png": plot_channels(content, moved, MOVES),
    }
    return Report("latents_report.json", content, latent_table(content), latent_lines(content), pictures)


def _measure_distortion(autoencoder: Autoencoder, images: ImageData, batch_size: int) -> dict[str, Any]:
    """PSNR of held-out images beside that of PCAs."""
    held_out, factor = images.val_indices[:HELD_OUT], autoencoder.factor
    batches = track_batches(images, held_out, batch_size, "held-out images, batches")
    own = torch.cat([psnr(part, autoencoder.decode(autoencoder.encode(part)[0]).cpu()) for part in batches])
    psnr_db, counts = own.mean().item(), spectrum.pca_counts(3 * factor**2, autoencoder.channels)
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
    """Mean PSNR in dB of images by the number of components of f x f patches, which are those of training images."""
    train = np.sort(images.train_indices[:PCA_IMAGES])
    title = f"PCA, f = {factor}, batches"
    components = patch_components(track_batches(images, train, batch_size, title), factor)
    parts = track_batches(images, indices, batch_size, title)
    return torch.cat([pca_curve(components, part, factor, counts) for part in parts], dim=1).mean(1).tolist()


def _move_channels(autoencoder: Autoencoder, images: ImageData, found: ChannelStatistics) -> dict[int, Tensor]:
    """Images with each of the channels moved that hold the most information."""
    shown = found.information.argsort(descending=True)[:MOVED_CHANNELS].sort().values.tolist()
    first = autoencoder.encode(images.batch(held_out_apart(images, MOVED_IMAGES)))[0]
    return {
        channel: move_channel(autoencoder, first, channel, found.std[channel].item())
        for channel in track(shown, "moving channels")
    }


def require_finite(values: Tensor, what: str) -> None:
    """Refuse what an autoencoder made of images where it is not finite.

    Args:
        values: One row per image.

    Raises:
        UserError: saying of how many images.
    """
    if wrong := int((~values.flatten(1).isfinite().all(1)).sum()):
        raise UserError(
            f"The autoencoder's {what} of {wrong} of {len(values)} images are not finite: its training diverged. Train "
            "it again, with a lower optimizer.lr."
        )


def move_channel(autoencoder: Autoencoder, mean: Tensor, channel: int, std: float) -> Tensor:
    """Images [k, 3, 3, H, W] decoded from latents [k, C, h, w] with one channel moved everywhere by MOVES times std."""
    z_raw = mean[:, None].repeat(1, len(MOVES), 1, 1, 1)
    z_raw[:, :, channel] += std * torch.tensor(MOVES, device=mean.device)[:, None, None]
    return autoencoder.decode(z_raw.flatten(0, 1)).float().cpu().unflatten(0, z_raw.shape[:2])


def pca_curve(components: tuple[Tensor, Tensor], images: Tensor, factor: int, counts: list[int]) -> Tensor:
    """PSNR in dB of each image [b, 3, H, W] reconstructed from so many components, [len(counts), b]: what
    `pca_reconstruction` gives for each count, from one decomposition.

    Args:
        components: Of `patch_components`.
        counts: Ascending.
    """
    mean, basis = components
    coefficients = (unfold(images, factor) - mean) @ basis
    found, patches, done = [], mean.expand_as(coefficients), 0
    for count in counts:
        patches = patches + coefficients[..., done:count] @ basis[:, done:count].T
        found.append(psnr(images, fold(patches, factor).clamp(-1, 1)))
        done = count
    return torch.stack(found)


def _spectrum(eigenvalues: Tensor) -> dict[str, Any]:
    return {
        "effective_rank": spectrum.effective_rank(eigenvalues),
        "participation_ratio": spectrum.participation_ratio(eigenvalues),
        "components": {str(share): spectrum.num_components(eigenvalues, share) for share in SHARES},
        "eigenvalues": eigenvalues.tolist(),
    }
