"""Encode the images of a run, and compute the statistics used to standardise the latents."""

from typing import Any, Literal

import numpy as np
import torch

from ldm.autoencoder.autoencoder import Autoencoder, LatentStatistics, published_statistics
from ldm.data.images import ImageData
from ldm.errors import InputError
from ldm.latents.cache import LatentData, open_latents
from ldm.latents.contract import LatentContract
from ldm.runtime.random import numpy_generator, torch_generator

MAX_SCALE_IMAGES = 8192
StatisticsType = Literal["measured", "published"]


def encode_latents(
    autoencoder: Autoencoder,
    images: ImageData,
    flip: bool,
    cache_dir: str | None,
    *,
    mean_and_std: tuple[list[float], list[float]] | None = None,
) -> tuple[LatentContract, Any]:
    """Return the contract and the cached moments of these images. Update `autoencoder.statistics` if necessary.

    Args:
        mean_and_std: Per-channel mean and standard deviation with which to standardise the latents. If None, they are
            measured.
    """
    channels, _, _ = autoencoder.latent_shape(images.resolution)
    contract = LatentContract(
        autoencoder_sha256=autoencoder.weights_sha256(),
        data_fingerprint=images.fingerprint,
        resolution=images.resolution,
        factor=autoencoder.factor,
        channels=channels,
        val_fraction=images.val_fraction,
        flip=flip,
    )
    latents = open_latents(autoencoder.encode, contract, images, cache_dir=cache_dir)
    current = autoencoder.statistics
    expected = (images.fingerprint, contract.autoencoder_sha256)
    if mean_and_std or current is None or (current.data, current.weights_sha256) != expected:
        mean, std = mean_and_std or measure_statistics(latents, images.train_indices)
        autoencoder.statistics = LatentStatistics(
            latent_mean=mean,
            latent_std=std,
            decoder_scale=decoder_scale(autoencoder, images, latents),
            data=images.fingerprint,
            weights_sha256=contract.autoencoder_sha256,
        )
    return contract, latents


def decoder_scale(autoencoder: Autoencoder, images: ImageData, latents: Any, batch_size: int = 64) -> list[float]:
    """Return the RMS of x - decode(z_raw) per colour channel over the training split, sampling z_raw once per image.

    This is the maximum-likelihood scale of a Gaussian p(x | z_raw) with one standard deviation per colour channel. At
    most MAX_SCALE_IMAGES random images are used, which gives a sampling error of about half a percent.
    """
    generator = torch_generator(0)
    squares, count = torch.zeros(3, dtype=torch.float64), 0
    sampled = np.sort(numpy_generator(0).permutation(images.train_indices)[:MAX_SCALE_IMAGES])
    for start in range(0, len(sampled), batch_size):
        indices = sampled[start : start + batch_size]
        mean, log_variance = latents.batch(indices)
        z_raw = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
        error = images.batch(indices) - autoencoder.decode(z_raw).cpu()
        squares += error.double().square().sum(dim=(0, 2, 3))
        count += error[:, 0].numel()
    return (squares / count).sqrt().tolist()


def resolve_statistics(autoencoder: Autoencoder, statistics: StatisticsType) -> tuple[list[float], list[float]] | None:
    """Return the published mean and std of a pretrained autoencoder, or None if statistics="measured".

    Raises:
        InputError: The autoencoder has no published statistics.
    """
    if statistics == "measured":
        return None
    if (mean_and_std := published_statistics(autoencoder.model)) is None:
        model = type(autoencoder.model).__name__
        rule = f"requires a scaling factor, but this {model} has none. Use measured statistics instead"
        raise InputError("latent_statistics", statistics, rule)
    return mean_and_std


def measure_statistics(
    latents: LatentData, indices: np.ndarray, batch_size: int = 4096
) -> tuple[list[float], list[float]]:
    """Return the per-channel mean and standard deviation of z_raw ~ N(mean, exp(log_variance)) over these images.

    Uses the law of total variance, Var z = Var(mean) + E exp(log_variance), in float64 throughout.
    """
    zeros = torch.zeros(latents.shape[0], dtype=torch.float64)
    count, total, squares, posterior_variance = 0, zeros, zeros, zeros
    for start in range(0, len(indices), batch_size):
        for view in range(latents.moments.shape[1]):
            mean, log_variance = latents.batch(indices[start : start + batch_size], view)
            mean, log_variance = mean.double(), log_variance.double()
            count += mean.shape[0] * mean.shape[2] * mean.shape[3]
            total = total + mean.sum((0, 2, 3))
            squares = squares + mean.square().sum((0, 2, 3))
            posterior_variance = posterior_variance + log_variance.exp().sum((0, 2, 3))
    average = total / count
    variance = squares / count - average**2 + posterior_variance / count
    return average.tolist(), variance.clamp(min=1e-12).sqrt().tolist()
