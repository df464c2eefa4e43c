"""Report on the reconstructions of held-out images: distortion, feature distances, rate, and the worst images."""

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor, nn

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.autoencoder.perceptual import LPIPS
from ldm.data.images import ImageData
from ldm.errors import UserError
from ldm.evaluation.features import NO_FEATURES, feature_title, load_features, reference_features
from ldm.evaluation.image_sets import image_text, track_batches
from ldm.evaluation.latents.report import held_out_pca, require_finite
from ldm.evaluation.samples.distances import Measures, describe_setting, fd_name
from ldm.image_grid import grid, to_pil
from ldm.metrics.codes import codebook_metrics, kl, kl_metrics
from ldm.metrics.image import psnr, ssim
from ldm.metrics.metric import ERROR_SUFFIX, UNMEASURED, mean_metric, metrics_to_json
from ldm.metrics.report import Report
from ldm.rules import Count, checked
from ldm.runs.run import EVALUATION_FILE, Run, choose_images

NUM_WORST, NUM_TRAIN_IMAGES = 12, 4096
"""Number of worst images in the figure, and maximum number of training images for codebook usage."""
AMPLIFICATION = 4
"""Factor by which errors are amplified in the figure."""


def reconstruction_table(content: dict[str, Any]) -> Table:
    """Return a table with one row per metric: its value, its standard error and a remark."""
    features = ""
    if content["features"]:
        features = f"; features: {feature_title(content)}{' (used in the loss)' * content['features_in_loss']}"
    title = f"Reconstructions of {content['num_images']} held-out images from {content['images']}{features}"
    table = Table("", title=title, title_justify="left")
    for name in ("value", "+-", "remark"):
        table.add_column(name, justify="left" if name == "remark" else "right")
    fd = content.get("fd_name", "")
    rows = (
        ("PSNR, dB", "psnr_db", 2, "PCA of the same size: {pca_psnr_db:.2f}"),
        ("SSIM", "ssim", 4, ""),
        ("LPIPS", "lpips", 4, "used in the loss" * content["lpips_in_loss"]),
        (fd, "fd_reconstructions", 4, ""),
        (f"{fd}, validation vs training", "fd_validation", 4, ""),
        ("KD", "kd_reconstructions", 4, ""),
        ("KD, validation vs training", "kd_validation", 4, ""),
        ("classifier accuracy", "classifier_val_accuracy", 3, "on validation images"),
        ("KL, bits per image", "kl_bits", 1, "per pixel value: {kl_bits_per_value:.3f}"),
        ("codebook usage", "codebook_usage", 3, "on training images: {codebook_usage_train:.3f}"),
        ("codebook perplexity", "codebook_perplexity", 1, "{codebook_size} codes"),
    )
    values = metrics_to_json(content)
    for name, key, digits, remark in rows:
        if (value := values.get(key)) is not None:
            error = values.get(key + ERROR_SUFFIX)
            numbers = ("" if number is None else f"{number:.{digits}f}" for number in (value, error))
            table.add_row(name, *numbers, remark.format(**values))
    return table


def reconstruction_lines(content: dict[str, Any]) -> list[str]:
    """Return lines that describe how the distances were measured. docs/latent_size.md explains them."""
    lines = []
    if content["features"]:
        n, reference = content["num_images"], content["reference"]
        pca = f" (PCA of {reference})" if content["fd_components"] else ""
        lines.append(
            f"{content['fd_name']}{pca} and KD with {feature_title(content)}: N={n}, ref=originals of the same {n} "
            f"images; validation vs training: ref={reference}, N={content['num_reference']}"
        )
    if content["lpips_left_out"]:
        lines.append(f"LPIPS was skipped: {content['lpips_left_out']}.")
    return lines


@checked
def measure_reconstructions(
    run: Run,
    *,
    device: torch.device,
    features: str = "efficientnet_lite",
    features_path: str | None = None,
    num_images: int = 4096,
    seed: int = 0,
    batch_size: Count = 64,
) -> Report:
    """Compare a run's validation images with their reconstructions decode(mean of q(z_raw|x)).

    Args:
        features: A name from `ldm.metrics.features.FEATURE_NETWORKS`, "classifier" or "none".
        features_path: Folder or hub id of the feature network's weights.
        num_images: Maximum number of validation images; the seed determines which images are used.

    Raises:
        UserError: As raised by `choose_images` and `load_features`, or if reconstructions are not finite.
    """
    started, autoencoder = time.perf_counter(), run.autoencoder().to(device)
    images, indices = choose_images(run, "val", num_images, seed)
    network = None if features == NO_FEATURES else load_features(features, images, features_path).to(device)
    lpips, lpips_error = _load_lpips()
    in_loss = run.facts.get("perceptual_features", [])
    gallery = None if network is None else reference_features(network, features, images)
    batches = partial(track_batches, images, batch_size=batch_size)
    values = _compare_images(autoencoder, batches(indices, title="held-out images (batches)"), network, lpips)
    factor = autoencoder.factor
    pca_channels = [min(autoencoder.channels, 3 * factor**2)]
    # a few held-out images cannot use all codes, so usage is also measured on training images
    train_batches = batches(images.train_indices[:NUM_TRAIN_IMAGES], title="codes of training images (batches)")
    content: dict[str, Any] = {
        "run": str(run.path),
        "weights_sha256": autoencoder.weights_sha256(),
        "images": f"{images.name}/val@{images.fingerprint[:8]}",
        "num_images": len(indices),
        "seed": seed,
        "regulariser": autoencoder.regulariser,
        "latent_shape": list(autoencoder.latent_shape(images.resolution)),
        "factor": factor,
        "psnr_db": mean_metric(values["psnr"]),
        "pca_psnr_db": held_out_pca(images, indices, factor, pca_channels, batch_size)[0],
        "ssim": mean_metric(values["ssim"]),
        "lpips": mean_metric(values["lpips"]) if "lpips" in values else UNMEASURED,
        "lpips_left_out": lpips_error,
        "lpips_in_loss": lpips is not None and "lpips" in in_loss,
        "features": None,
        "features_in_loss": network is not None and features in in_loss,
        **kl_metrics(values.get("kl"), 3 * images.resolution**2),
        **codebook_metrics(_count_codes(autoencoder, batches(indices, title="codes of held-out images (batches)"))),
        "codebook_usage_train": codebook_metrics(_count_codes(autoencoder, train_batches))["codebook_usage"],
    }
    if network is not None and gallery is not None:
        train, originals = (gallery[torch.from_numpy(rows)] for rows in (images.train_indices, indices))
        content |= describe_setting(network, features, images)
        content |= reconstruction_distances(values["features"], originals, train)
        content["fd_name"] = fd_name(network, content["fd_components"])
        if (accuracy := getattr(network, "val_accuracy", None)) is not None:
            content["classifier_val_accuracy"] = accuracy
    content["seconds"] = round(time.perf_counter() - started, 1)
    worst = _plot_worst(autoencoder, images, indices, content, values["psnr"])
    table, lines = reconstruction_table(content), reconstruction_lines(content)
    return Report(EVALUATION_FILE, content, table, lines, {"worst_reconstructions.png": worst})


def reconstruction_distances(reconstructed: Tensor, originals: Tensor, train: Tensor) -> dict[str, Any]:
    """Measure FD and KD from reconstructions to their originals, and from the originals to the training images.

    FD is computed on the first principal components of the training images if a set has fewer than twice as many images
    as feature dimensions. A distance is UNMEASURED if there are too few images to estimate its standard error. The
    jackknife removes each image together with its reconstruction.

    Args:
        reconstructed, originals: Features [n, d]; row i of both belongs to image i.
        train: Features of the training images, [m, d].
    """
    measures, dim = Measures.choose(train, len(originals), num_reference=len(train)), originals.shape[1]
    metrics: dict[str, Any] = {"feature_dim": dim, "fd_components": measures.num_components}
    pairs = {"reconstructions": (reconstructed, originals, True), "validation": (originals, train, False)}
    for name, (features, reference, paired) in pairs.items():
        metrics[f"fd_{name}"] = measures.fd(features, reference, paired=paired)
        metrics[f"kd_{name}"] = measures.kd(features, reference, paired=paired)
    return metrics


def _load_lpips() -> tuple[LPIPS | None, str | None]:
    """Return (LPIPS network, None), or (None, reason) if the network cannot be loaded."""
    try:
        return LPIPS(), None
    except UserError as error:
        return None, str(error).rstrip(".")


@torch.no_grad()
def _compare_images(
    autoencoder: Autoencoder,
    batches: Iterable[Tensor],
    network: nn.Module | None,
    lpips: nn.Module | None,
) -> dict[str, Tensor]:
    """Return one scalar or one feature vector per image, by metric name."""
    collected = defaultdict[str, list[Tensor]](list)
    for batch in batches:
        mean, log_variance = autoencoder.encode(batch)
        original, reconstruction = batch.to(autoencoder.device), autoencoder.decode(mean).float()
        values = {"psnr": psnr(original, reconstruction), "ssim": ssim(original, reconstruction)}
        if lpips is not None:
            values["lpips"] = lpips.to(autoencoder.device)(original, reconstruction)
        if network is not None:
            values["features"] = network(reconstruction).float()
        if autoencoder.has_density:
            values["kl"] = kl(mean, log_variance)
        for name, value in values.items():
            collected[name].append(value.cpu())
    results = {name: torch.cat(tensors) for name, tensors in collected.items()}
    require_finite(results["psnr"][:, None], "reconstructions")
    return results


def _count_codes(autoencoder: Autoencoder, batches: Iterable[Tensor]) -> Tensor | None:
    """Return the number of uses of each code, or None if the autoencoder has no codebook."""
    if (size := autoencoder.codebook_size) is None:
        return None
    codes = torch.cat([autoencoder.codes(autoencoder.encode(batch)[0]).flatten().cpu() for batch in batches])
    return codes.bincount(minlength=size)


def _plot_worst(
    autoencoder: Autoencoder, images: ImageData, indices: np.ndarray, content: dict[str, Any], psnr_db: Tensor
) -> Image.Image:
    rows = psnr_db.argsort()[:NUM_WORST]
    worst = indices[rows.numpy()].tolist()
    originals = images.batch(worst)
    reconstructions = autoencoder.decode(autoencoder.encode(originals)[0]).float().cpu()
    captions = [f"{psnr_db[row]:.1f} dB {image_text(images, i)}" for row, i in zip(rows, worst, strict=True)]
    title = (
        f"The {len(worst)} worst of {content['num_images']} held-out images from {content['images']} by PSNR; "
        f"mean of all images: {content['psnr_db'].value:.1f} dB"
    )
    return plot_reconstructions(originals, reconstructions, captions, title)


def plot_reconstructions(
    originals: Tensor, reconstructions: Tensor, captions: Sequence[str], title: str
) -> Image.Image:
    """Plot the original, the reconstruction and the absolute error of each image in one column.

    Args:
        originals, reconstructions: Images [k, 3, H, W] in [-1, 1].
        captions: Captions of the originals.
    """
    errors, num = AMPLIFICATION * (originals - reconstructions).abs() - 1, len(originals)
    cells = [*to_pil(originals), *to_pil(reconstructions), *to_pil(errors)]
    texts = [*captions, *["reconstruction"] * num, *[f"|error| x {AMPLIFICATION}"] * num]
    return grid(cells, texts, columns=num, title=title)
