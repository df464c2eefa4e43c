"""How well an autoencoder gives held-out images back: distortion, distances in features, rate, and its worst images."""

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
from ldm.metrics.codes import codebook, kl, rate
from ldm.metrics.image import psnr, ssim
from ldm.metrics.metric import ERROR, UNMEASURED, mean_metric, metrics_to_json
from ldm.metrics.report import Report
from ldm.rules import Count, checked
from ldm.runs.run import EVALUATION_FILE, Run, choose_images

WORST, TRAIN_IMAGES = 12, 4096
"""Images that are shown, and training images whose codes are counted."""
AMPLIFIED = 4
"""Errors are shown so many times as bright as they are."""


def reconstruction_table(content: dict[str, Any]) -> Table:
    """A row per metric, with its standard error over the images and what stands beside it."""
    of = ""
    if content["features"]:
        of = f"; features: {feature_title(content)}{' (in the loss)' * content['features_in_loss']}"
    title = f"Reconstructions of {content['num_images']} held-out images, {content['images']}{of}"
    table = Table("", title=title, title_justify="left")
    for name in ("value", "+-", "beside it"):
        table.add_column(name, justify="left" if name == "beside it" else "right")
    fd = content.get("fd_name", "")
    rows = (
        ("PSNR, dB", "psnr_db", 2, "PCA of the same size: {pca_psnr_db:.2f}"),
        ("SSIM", "ssim", 4, ""),
        ("LPIPS", "lpips", 4, "in the loss" * content["lpips_in_loss"]),
        (fd, "fd_reconstructions", 4, ""),
        (f"{fd}, validation to training", "fd_validation", 4, ""),
        ("KD", "kd_reconstructions", 4, ""),
        ("KD, validation to training", "kd_validation", 4, ""),
        ("accuracy of the classifier", "classifier_val_accuracy", 3, "on validation images"),
        ("KL, bits per image", "kl_bits", 1, "per pixel value: {kl_bits_per_value:.3f}"),
        ("codebook in use", "codebook_usage", 3, "by the training images: {codebook_usage_train:.3f}"),
        ("perplexity of the codes", "codebook_perplexity", 1, "{codebook_size} codes"),
    )
    values = metrics_to_json(content)
    for name, key, digits, beside in rows:
        if (value := values.get(key)) is not None:
            error = values.get(key + ERROR)
            numbers = ("" if number is None else f"{number:.{digits}f}" for number in (value, error))
            table.add_row(name, *numbers, beside.format(**values))
    return table


def reconstruction_lines(content: dict[str, Any]) -> list[str]:
    """What the distances are of; docs/reading_the_numbers.md says what they prove."""
    lines = []
    if content["features"]:
        n, reference = content["num_images"], content["reference"]
        of = f", PCA of {reference}" if content["fd_components"] else ""
        lines.append(
            f"{content['fd_name']}{of}, and KD of {feature_title(content)}: N={n}, ref=originals of the same {n} "
            f"images; validation against training images: ref={reference}, N={content['num_reference']}"
        )
    if content["lpips_left_out"]:
        lines.append(f"LPIPS is left out: {content['lpips_left_out']}.")
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
    """Compare a run's validation images with what its autoencoder makes of them, decode(mean of q(z_raw|x)).

    Args:
        features: A name of `ldm.metrics.features.CHOICES`, classifier, or none.
        features_path: Folder or hub id of their weights.
        num_images: Validation images at most, chosen by the seed.

    Raises:
        UserError: what `choose_images` and `load_features` refuse, reconstructions that are not finite.
    """
    started, autoencoder = time.perf_counter(), run.autoencoder().to(device)
    images, indices = choose_images(run, "val", num_images, seed)
    network = None if features == NO_FEATURES else load_features(features, images, features_path).to(device)
    lpips, without = _lpips()
    in_loss = run.facts.get("perceptual_features", [])
    gallery = None if network is None else reference_features(network, features, images)
    batches = partial(track_batches, images, batch_size=batch_size)
    found = _compare_images(autoencoder, batches(indices, title="held-out images, batches"), network, lpips)
    factor = autoencoder.factor
    pca_channels = [min(autoencoder.channels, 3 * factor**2)]
    # of few held-out images, most codes could not be in use
    of_train = batches(images.train_indices[:TRAIN_IMAGES], title="codes of training images, batches")
    content: dict[str, Any] = {
        "run": str(run.path),
        "weights_sha256": autoencoder.weights_sha256(),
        "images": f"{images.name}/val@{images.fingerprint[:8]}",
        "num_images": len(indices),
        "seed": seed,
        "regulariser": autoencoder.regulariser,
        "latent_shape": list(autoencoder.latent_shape(images.resolution)),
        "factor": factor,
        "psnr_db": mean_metric(found["psnr"]),
        "pca_psnr_db": held_out_pca(images, indices, factor, pca_channels, batch_size)[0],
        "ssim": mean_metric(found["ssim"]),
        "lpips": mean_metric(found["lpips"]) if "lpips" in found else UNMEASURED,
        "lpips_left_out": without,
        "lpips_in_loss": lpips is not None and "lpips" in in_loss,
        "features": None,
        "features_in_loss": network is not None and features in in_loss,
        **rate(found.get("kl"), 3 * images.resolution**2),
        **codebook(_count_codes(autoencoder, batches(indices, title="codes"))),
        "codebook_usage_train": codebook(_count_codes(autoencoder, of_train))["codebook_usage"],
    }
    if network is not None and gallery is not None:
        train, own = (gallery[torch.from_numpy(rows)] for rows in (images.train_indices, indices))
        content |= describe_setting(network, features, images)
        content |= reconstruction_distances(found["features"], own, train)
        content["fd_name"] = fd_name(network, content["fd_components"])
        if (share := getattr(network, "val_accuracy", None)) is not None:
            content["classifier_val_accuracy"] = share
    content["seconds"] = round(time.perf_counter() - started, 1)
    worst = _plot_worst(autoencoder, images, indices, content, found["psnr"])
    table, lines = reconstruction_table(content), reconstruction_lines(content)
    return Report(EVALUATION_FILE, content, table, lines, {"worst_reconstructions.png": worst})


def reconstruction_distances(reconstructed: Tensor, own: Tensor, train: Tensor) -> dict[str, Any]:
    """FD and KD of reconstructions to the originals of the same images, and of those to the training images.

    FD is on the first principal components of the training images where one of the sets has fewer than 2 d images.
    Either is UNMEASURED where there are too few for its error. An image and its reconstruction are left out together.

    Args:
        reconstructed, own: Features [n, d], row by row of the same image.
        train: [m, d].
    """
    measures, dim = Measures.choose(train, len(own), num_reference=len(train)), own.shape[1]
    found: dict[str, Any] = {"feature_dim": dim, "fd_components": measures.num_components}
    sides = {"reconstructions": (reconstructed, own, True), "validation": (own, train, False)}
    for name, (features, reference, paired) in sides.items():
        found[f"fd_{name}"] = measures.fd(features, reference, paired=paired)
        found[f"kd_{name}"] = measures.kd(features, reference, paired=paired)
    return found


def _lpips() -> tuple[LPIPS | None, str | None]:
    """The network, or why there is none: a report without a network at hand is a report all the same."""
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
    """By name, a value or a vector per image."""
    parts = defaultdict[str, list[Tensor]](list)
    for part in batches:
        mean, log_variance = autoencoder.encode(part)
        original, reconstruction = part.to(autoencoder.device), autoencoder.decode(mean).float()
        values = {"psnr": psnr(original, reconstruction), "ssim": ssim(original, reconstruction)}
        if lpips is not None:
            values["lpips"] = lpips.to(autoencoder.device)(original, reconstruction)
        if network is not None:
            values["features"] = network(reconstruction).float()
        if autoencoder.has_density:
            values["kl"] = kl(mean, log_variance)
        for name, value in values.items():
            parts[name].append(value.cpu())
    found = {name: torch.cat(values) for name, values in parts.items()}
    require_finite(found["psnr"][:, None], "reconstructions")
    return found


def _count_codes(autoencoder: Autoencoder, batches: Iterable[Tensor]) -> Tensor | None:
    """How often each code is used; None where there is no codebook."""
    if (size := autoencoder.codebook_size) is None:
        return None
    codes = torch.cat([autoencoder.codes(autoencoder.encode(part)[0]).flatten().cpu() for part in batches])
    return codes.bincount(minlength=size)


def _plot_worst(
    autoencoder: Autoencoder, images: ImageData, indices: np.ndarray, content: dict[str, Any], psnr_db: Tensor
) -> Image.Image:
    rows = psnr_db.argsort()[:WORST]
    worst = indices[rows.numpy()].tolist()
    originals = images.batch(worst)
    reconstructions = autoencoder.decode(autoencoder.encode(originals)[0]).float().cpu()
    captions = [f"{psnr_db[row]:.1f} dB {image_text(images, i)}" for row, i in zip(rows, worst, strict=True)]
    title = (
        f"The {len(worst)} worst of {content['num_images']} held-out images of {content['images']} by PSNR; "
        f"the mean of all is {content['psnr_db'].value:.1f} dB"
    )
    return plot_reconstructions(originals, reconstructions, captions, title)


def plot_reconstructions(
    originals: Tensor, reconstructions: Tensor, captions: Sequence[str], title: str
) -> Image.Image:
    """Original, reconstruction and |error| of each image in one column.

    Args:
        originals, reconstructions: [k, 3, H, W] in [-1, 1].
        captions: Of each original.
    """
    errors, num = AMPLIFIED * (originals - reconstructions).abs() - 1, len(originals)
    pictures = [*to_pil(originals), *to_pil(reconstructions), *to_pil(errors)]
    below = [*captions, *["reconstruction"] * num, *[f"|error| x {AMPLIFIED}"] * num]
    return grid(pictures, below, columns=num, title=title)
