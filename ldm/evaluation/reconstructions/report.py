"""How well an autoencoder gives held-out images back: distortion, distances in features, rate, and its worst images."""

import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor, nn

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.autoencoder.perceptual import LPIPS, has_lpips
from ldm.data.images import ImageData
from ldm.errors import UserError, require_whole
from ldm.evaluation.evaluation_file import metrics_to_json
from ldm.evaluation.features import NO_FEATURES, describe_features, load_features, reference_features
from ldm.evaluation.image_sets import track_batches
from ldm.evaluation.latents.report import PCA_IMAGES, pca_curve, require_finite
from ldm.evaluation.reconstructions.figure import image_text, plot_reconstructions
from ldm.evaluation.reconstructions.rate import reconstruction_distances
from ldm.evaluation.samples.distances import fd_name
from ldm.files.atomic import durable_file, write_text
from ldm.metrics.codes import codebook, kl, rate
from ldm.metrics.image import patch_components, psnr, ssim
from ldm.metrics.metric import UNMEASURED, Metric
from ldm.metrics.subsets import NUM_SUBSETS
from ldm.runs.run import EVALUATION_FILE, Run, choose_images
from ldm.runtime import shell

WORST, TRAIN_IMAGES = 12, 4096
"""Images that are shown, and training images whose codes are counted."""


@dataclass(frozen=True)
class ReconstructionReport:
    """Metrics and their settings by name, and a picture of the worst reconstructions."""

    content: dict[str, Any]
    picture: Image.Image

    def to_json(self) -> dict[str, Any]:
        return metrics_to_json(self.content)

    def table(self) -> Table:
        """A row per metric, with its standard error over the images and what stands beside it."""
        found, size = self.content, f"{self.content['num_images']} held-out images"
        of = f"; features: {_feature_title(found)}" if found["features"] else ""
        table = Table(title=f"Reconstructions of {size}, {found['images']}{of}", title_justify="left")
        table.add_column("")
        for name in ("value", "+-"):
            table.add_column(name, justify="right")
        table.add_column("beside it")

        def add(name: str, key: str, digits: int, beside: str = "") -> None:
            metric = found[key] if isinstance(found[key], Metric) else Metric(found[key])
            if metric.is_measured:
                numbers = (metric.value, metric.standard_error)
                table.add_row(name, *("" if x is None else f"{x:.{digits}f}" for x in numbers), beside)

        add("PSNR, dB", "psnr_db", 2, f"PCA of the same size: {found['pca_psnr_db']:.2f}")
        add("SSIM", "ssim", 4)
        add("LPIPS", "lpips", 4)
        for kind in ("fd", "kd") if found["features"] else ():
            floor = found[f"{kind}_validation"]
            more = "" if floor.standard_error is None else f" +- {floor.standard_error:.4f}"
            beside = f"validation to training: {floor.value:.4f}{more}" if floor.is_measured else ""
            add(found["fd_name"] if kind == "fd" else "KD", f"{kind}_reconstructions", 4, beside)
        if found["kl_bits"] is not None:
            add("KL, bits per image", "kl_bits", 1, f"per pixel value: {found['kl_bits_per_value']:.3f}")
        if found["codebook_size"] is not None:
            size = found["codebook_size"]
            add("codebook in use", "codebook_usage", 3, f"by the training images: {found['codebook_usage_train']:.3f}")
            add("perplexity of the codes", "codebook_perplexity", 1, f"{size} codes")
        return table

    @property
    def lines(self) -> list[str]:
        """What the distances are of, and what they do not prove."""
        found, lines = self.content, []
        if found["features"]:
            n, reference = found["num_images"], found["reference"]
            of = f", PCA of {reference}" if found["fd_components"] else ""
            name = found["fd_name"]
            lines.append(
                f"{name}{of}, and KD of {_feature_title(found)}: N={n}, ref=originals of the same {n} images; "
                f"validation against training images: ref={reference}, N={found['num_reference']}. {name} compares at "
                "equal N only."
            )
            if not found["kd_reconstructions"].is_measured:
                lines.append(f"KD is left out: {NUM_SUBSETS} subsets of two need {2 * NUM_SUBSETS} images.")
            if "classifier_val_accuracy" in found:
                share = found["classifier_val_accuracy"]
                lines.append(f"The classifier names the class of {share:.1%} of the validation images.")
        if found["features_in_loss"]:
            lines.append(
                f"The loss of this autoencoder was trained on these same features, {found['features']}: FD and KD "
                "prove nothing about that term. features=classifier has seen no loss; it needs images with classes."
            )
        if found["lpips_left_out"]:
            lines.append(f"LPIPS is left out: {found['lpips_left_out']}.")
        if found["lpips_in_loss"]:
            lines.append("The loss of this autoencoder was trained on LPIPS: its LPIPS proves nothing about that term.")
        return lines

    def save(self, folder: Path) -> tuple[Path, Path]:
        """evaluation.json and worst_reconstructions.png."""
        data, picture = folder / EVALUATION_FILE, folder / "worst_reconstructions.png"
        with durable_file(picture) as partial:
            self.picture.save(partial)
        write_text(data, json.dumps(self.to_json(), indent=2) + "\n")
        return data, picture


def _feature_title(content: dict[str, Any]) -> str:
    """Features by what tells them apart: name, weights, size, library."""
    return content["features_key"] + (f" ({content['features_library']})" if content["features_library"] else "")


def measure_reconstructions(
    run: Run,
    *,
    device: torch.device,
    features: str = "efficientnet_lite",
    features_path: str | None = None,
    num_images: int = 4096,
    seed: int = 0,
    batch_size: int = 64,
) -> ReconstructionReport:
    """Compare a run's validation images with what its autoencoder makes of them, decode(mean of q(z_raw|x)).

    Args:
        features: A name of `ldm.metrics.features.CHOICES`, classifier, or none.
        features_path: Folder or hub id of their weights.
        num_images: Validation images at most, chosen by the seed.

    Raises:
        UserError: what `choose_images` and `load_features` refuse, reconstructions that are not finite.
    """
    require_whole("batch_size", batch_size, 1)
    started, autoencoder = time.perf_counter(), run.autoencoder().to(device)
    images, indices = choose_images(run, "val", num_images, seed)
    network = None if features == NO_FEATURES else load_features(features, images, features_path).to(device)
    lpips, without = _lpips()
    in_loss = run.facts.get("perceptual_features", [])
    gallery = None if network is None else reference_features(network, features, images)
    found = _compare_images(autoencoder, images, indices, network, lpips, batch_size)
    content: dict[str, Any] = {
        "run": str(run.path),
        "weights_sha256": autoencoder.weights_sha256(),
        "images": f"{images.name}/val@{images.fingerprint[:8]}",
        "num_images": len(indices),
        "seed": seed,
        "regulariser": autoencoder.regulariser,
        "latent_shape": list(autoencoder.latent_shape(images.resolution)),
        "factor": autoencoder.factor,
        "psnr_db": _mean_over_images(found["psnr"]),
        "pca_psnr_db": found["pca_psnr"].mean().item(),
        "ssim": _mean_over_images(found["ssim"]),
        "lpips": _mean_over_images(found["lpips"]) if "lpips" in found else UNMEASURED,
        "lpips_left_out": without,
        "lpips_in_loss": lpips is not None and "lpips" in in_loss,
        "features": None,
        "features_in_loss": network is not None and features in in_loss,
        **rate(found.get("kl"), 3 * images.resolution**2),
        **codebook(found.get("codes")),
        "codebook_usage_train": codebook(found.get("train_codes"))["codebook_usage"],
    }
    if network is not None and gallery is not None:
        train, own = (gallery[torch.from_numpy(rows)] for rows in (images.train_indices, indices))
        content |= {
            **describe_features(network, features),
            "reference": f"{images.name}/train@{images.fingerprint[:8]}",
        }
        content |= _feature_metrics(network, found["features"], own, train)
    content["seconds"] = round(time.perf_counter() - started, 1)
    return ReconstructionReport(content, _plot_worst(autoencoder, images, indices, content, found["psnr"]))


def _feature_metrics(network: nn.Module, reconstructed: Tensor, own: Tensor, train: Tensor) -> dict[str, Any]:
    found = reconstruction_distances(reconstructed, own, train)
    found["fd_name"] = fd_name(network, found["fd_components"])
    if (share := getattr(network, "val_accuracy", None)) is not None:
        found["classifier_val_accuracy"] = share
    return found


def _lpips() -> tuple[LPIPS | None, str | None]:
    """The network, or why there is none: a report without a network at hand is a report all the same."""
    if not has_lpips():
        return None, f"its packages are not installed: {shell.install_command('lpips')}"
    try:
        return LPIPS(), None
    except UserError:
        return None, "the weights of its network could not be fetched"


@torch.no_grad()
def _compare_images(
    autoencoder: Autoencoder,
    images: ImageData,
    indices: np.ndarray,
    network: nn.Module | None,
    lpips: nn.Module | None,
    batch_size: int,
) -> dict[str, Tensor]:
    """By name, a value or a vector per image; the counts of codes are over all images."""
    factor, size, with_kl = autoencoder.factor, autoencoder.codebook_size, autoencoder.has_density
    parts: dict[str, list[Tensor]] = {}
    counts, of_train = torch.zeros(2, size or 0, dtype=torch.long)
    batches = partial(track_batches, images, batch_size=batch_size)
    components = patch_components(batches(np.sort(images.train_indices[:PCA_IMAGES]), title="PCA, batches"), factor)
    for part in batches(indices, title="held-out images, batches"):
        mean, log_variance = autoencoder.encode(part)
        original, reconstruction = part.to(autoencoder.device), autoencoder.decode(mean).float()
        values = {"psnr": psnr(original, reconstruction), "ssim": ssim(original, reconstruction)}
        values["pca_psnr"] = pca_curve(components, part, factor, [min(autoencoder.channels, 3 * factor**2)])[0]
        if lpips is not None:
            values["lpips"] = lpips.to(autoencoder.device)(original, reconstruction)
        if network is not None:
            values["features"] = network(reconstruction).float()
        if with_kl:
            values["kl"] = kl(mean, log_variance)
        if size is not None:
            counts += autoencoder.codes(mean).flatten().cpu().bincount(minlength=size)
        for name, value in values.items():
            parts.setdefault(name, []).append(value.cpu())
    if size is not None:  # of few held-out images, most codes could not be in use
        for part in batches(images.train_indices[:TRAIN_IMAGES], title="codes of training images, batches"):
            of_train += autoencoder.codes(autoencoder.encode(part)[0]).flatten().cpu().bincount(minlength=size)
    found = {name: torch.cat(values) for name, values in parts.items()}
    require_finite(found["psnr"][:, None], "reconstructions")
    return found if size is None else {**found, "codes": counts, "train_codes": of_train}


def _mean_over_images(values: Tensor) -> Metric:
    return Metric(values.mean().item(), values.std().item() / math.sqrt(len(values)), n=len(values))


def _plot_worst(
    autoencoder: Autoencoder, images: ImageData, indices: np.ndarray, content: dict[str, Any], psnr_db: Tensor
) -> Image.Image:
    rows = psnr_db.argsort()[:WORST]
    worst = indices[rows.numpy()].tolist()
    originals = images.batch(worst)
    reconstructions = autoencoder.decode(autoencoder.encode(originals)[0]).float().cpu()
    headings = [(f"{psnr_db[row]:.1f} dB", image_text(images, i)) for row, i in zip(rows, worst, strict=True)]
    title = (
        f"The {len(worst)} worst of {content['num_images']} held-out images of {content['images']} by PSNR; "
        f"the mean of all is {content['psnr_db'].value:.1f} dB"
    )
    return plot_reconstructions(originals, reconstructions, headings, title)
