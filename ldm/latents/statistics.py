"""The latents that a stage leaves or takes: encoded under their contract, with the statistics that standardise them."""

from typing import Any, Literal

import numpy as np
import torch

from ldm.autoencoder.autoencoder import Autoencoder, LatentStatistics, published_statistics
from ldm.data.images import ImageData
from ldm.errors import InputError
from ldm.latents.cache import LatentData, open_latents
from ldm.latents.contract import LatentContract
from ldm.runtime.random import numpy_generator, torch_generator

SCALE_IMAGES = 8192
StatisticsType = Literal["measured", "published"]


def encode_latents(
    autoencoder: Autoencoder,
    images: ImageData,
    flip: bool,
    cache_dir: str | None,
    *,
    standard: tuple[list[float], list[float]] | None = None,
) -> tuple[LatentContract, Any]:
    """The contract and the cached moments of these images; measures the autoencoder's statistics on the way.

    Args:
        standard: Mean and standard deviation per channel to standardise by, instead of what the images measure.
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
    known = autoencoder.statistics
    of_these = (images.fingerprint, contract.autoencoder_sha256)
    if standard or known is None or (known.data, known.weights_sha256) != of_these:
        mean, std = standard or measure(latents, images.train_indices)
        autoencoder.statistics = LatentStatistics(
            latent_mean=mean,
            latent_std=std,
            decoder_scale=decoder_scale(autoencoder, images, latents),
            data=images.fingerprint,
            weights_sha256=contract.autoencoder_sha256,
        )
    return contract, latents


def decoder_scale(autoencoder: Autoencoder, images: ImageData, latents: Any, batch_size: int = 64) -> list[float]:
    """Root mean square of x - decode(z_raw) per colour over the training split, z_raw drawn once per image.

    Of more than SCALE_IMAGES so many are drawn, which leaves an error of about half a percent. The maximum-likelihood
    scale of a Gaussian p(x | z_raw) with one standard deviation per colour.
    """
    generator = torch_generator(0)
    squares, count = torch.zeros(3, dtype=torch.float64), 0
    chosen = np.sort(numpy_generator(0).permutation(images.train_indices)[:SCALE_IMAGES])
    for start in range(0, len(chosen), batch_size):
        indices = chosen[start : start + batch_size]
        mean, log_variance = latents.batch(indices)
        z_raw = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
        error = images.batch(indices) - autoencoder.decode(z_raw).cpu()
        squares += error.double().square().sum(dim=(0, 2, 3))
        count += error[:, 0].numel()
    return (squares / count).sqrt().tolist()


def published(autoencoder: Autoencoder, statistics: StatisticsType) -> tuple[list[float], list[float]] | None:
    """What `published` standardises by: what a pretrained autoencoder states. None with `measured`.

    Raises:
        InputError: it states nothing.
    """
    if statistics == "measured":
        return None
    if (found := published_statistics(autoencoder.model)) is None:
        rule = f"must be measured: this {type(autoencoder.model).__name__} states no scaling factor"
        raise InputError("latent_statistics", statistics, rule)
    return found


def measure(latents: LatentData, indices: np.ndarray, batch_size: int = 4096) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of z_raw ~ N(mean, exp(log_variance)) over these images.

    By the law of total variance: Var z = Var(mean) + E exp(log_variance). float64 throughout.
    """
    zeros = torch.zeros(latents.shape[0], dtype=torch.float64)
    count, total, squares, within = 0, zeros, zeros, zeros
    for start in range(0, len(indices), batch_size):
        for view in range(latents.moments.shape[1]):
            mean, log_variance = latents.batch(indices[start : start + batch_size], view)
            mean, log_variance = mean.double(), log_variance.double()
            count += mean.shape[0] * mean.shape[2] * mean.shape[3]
            total = total + mean.sum((0, 2, 3))
            squares = squares + mean.square().sum((0, 2, 3))
            within = within + log_variance.exp().sum((0, 2, 3))
    average = total / count
    variance = squares / count - average**2 + within / count
    return average.tolist(), variance.clamp(min=1e-12).sqrt().tolist()
