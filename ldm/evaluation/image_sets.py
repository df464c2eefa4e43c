"""Images that are read or made as they are asked for, so that nothing holds all of them at once, and what they show."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.images import ImageData
from ldm.progress import track
from ldm.runtime.random import sample_generators
from ldm.sampling.pipeline import LatentDiffusionPipeline


@dataclass(frozen=True)
class Reconstructions:
    """What the autoencoder makes of these images, decode(mean of q(z_raw|x)): the best that its decoder can show."""

    pipeline: LatentDiffusionPipeline
    images: ImageData
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Any) -> Tensor:
        autoencoder = self.pipeline.autoencoder
        return autoencoder.decode(autoencoder.encode(self.images.batch(self.rows[np.asarray(indices)]))[0]).cpu()


@dataclass(frozen=True)
class VAEAlone:
    """z_raw ~ N(0, I), decoded: what the VAE would draw without the chain."""

    pipeline: LatentDiffusionPipeline
    num: int
    seed: int

    def __len__(self) -> int:
        return self.num

    def batch(self, indices: Any) -> Tensor:
        generators = sample_generators(self.seed, indices)
        noise = [torch.randn(self.pipeline.latent_shape, generator=g) for g in generators]
        return self.pipeline.autoencoder.decode(torch.stack(noise)).cpu()


def track_batches(images: ImageData, rows: np.ndarray, batch_size: int, title: str) -> Iterator[Tensor]:
    """Yield the images of these rows in batches, with a progress bar."""
    for start in track(range(0, len(rows), batch_size), title):
        yield images.batch(rows[start : start + batch_size])


def image_text(images: ImageData, i: int) -> str:
    """What an image shows: its caption, else its class, else nothing."""
    if images.captions and (caption := images.captions[i]):
        return caption
    if images.labels and images.class_names and (of_class := images.labels[i]) is not None:
        return images.class_names[of_class]
    return ""


def held_out_apart(images: ImageData, num: int) -> np.ndarray:
    """So many validation images, at equal distances: neighbours in the data are alike, flags or faces."""
    num = min(num, len(images.val_indices))
    return images.val_indices[np.linspace(0, len(images.val_indices) - 1, num).round().astype(int)]
