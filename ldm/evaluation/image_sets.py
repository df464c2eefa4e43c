"""Image sets that are loaded or generated in batches to limit memory use, and captions of images."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.images import ImageData
from ldm.progress import track
from ldm.runtime.random import sample_generators
from ldm.sampling.pipeline import LatentDiffusion


@dataclass(frozen=True)
class Reconstructions:
    """Autoencoder reconstructions, decode(mean of q(z_raw|x)): an upper bound on the quality of samples."""

    pipeline: LatentDiffusion
    images: ImageData
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Any) -> Tensor:
        autoencoder = self.pipeline.autoencoder
        return autoencoder.decode(autoencoder.encode(self.images.batch(self.rows[np.asarray(indices)]))[0]).cpu()


@dataclass(frozen=True)
class VAEAlone:
    """Samples from the VAE alone: z_raw ~ N(0, I), decoded without the diffusion model."""

    pipeline: LatentDiffusion
    num_samples: int
    seed: int

    def __len__(self) -> int:
        return self.num_samples

    def batch(self, indices: Any) -> Tensor:
        generators = sample_generators(self.seed, indices)
        noise = [torch.randn(self.pipeline.latent_shape, generator=g) for g in generators]
        return self.pipeline.autoencoder.decode_samples(torch.stack(noise)).cpu()


def track_batches(images: ImageData, rows: np.ndarray, batch_size: int, title: str) -> Iterator[Tensor]:
    """Yield the images at `rows` in batches, with a progress bar."""
    for start in track(range(0, len(rows), batch_size), title):
        yield images.batch(rows[start : start + batch_size])


def image_text(images: ImageData, i: int) -> str:
    """Return the caption of an image, or its class name if it has no caption, or an empty string if it has neither."""
    if images.captions and (caption := images.captions[i]):
        return caption
    if images.labels and images.class_names and (label := images.labels[i]) is not None:
        return images.class_names[label]
    return ""


def spaced_val_indices(images: ImageData, num: int) -> np.ndarray:
    """Return `num` validation indices, evenly spaced because neighbouring images in a data set are often similar."""
    num = min(num, len(images.val_indices))
    return images.val_indices[np.linspace(0, len(images.val_indices) - 1, num).round().astype(int)]
