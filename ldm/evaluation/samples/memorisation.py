"""Detection of memorisation: samples that are closer to training images than held-out images are."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.data.images import ImageData
from ldm.evaluation.features import ImageSet
from ldm.evaluation.image_sets import image_text
from ldm.image_grid import grid, to_pil
from ldm.metrics.neighbours import chunk_size

PAIRS_PER_ROW = 4
QUANTILE = 0.01
"""Samples count as close if their distance is below this quantile of the held-out distances."""
NUM_PAIRS = 12


@dataclass(frozen=True)
class Memorisation:
    """Cosine distances, from 0 to 2, between samples and their nearest training images."""

    distances: Tensor
    """Distance from each sample to its nearest training image, [n]."""
    nearest_rows: Tensor
    """Row of each sample's nearest training image, [n]."""
    validation_distances: Tensor
    """Distance from each held-out image to its nearest training image, [v]."""
    threshold: float
    """The 1st percentile of `validation_distances`."""
    closest_samples: Tensor
    """Indices of the samples in the closest pairs, in ascending order of distance; at most NUM_PAIRS."""

    @property
    def close_share(self) -> float:
        """Proportion of samples below the threshold, about 1% for new images from the data distribution."""
        return (self.distances < self.threshold).double().mean().item()

    @property
    def close_share_standard_error(self) -> float:
        """Standard error of `close_share`, sqrt(p (1 - p) (1 / n + 1 / v)).

        p is set to at least 1%, so that the error is not 0 if no sample is close.

        The term 1 / v accounts for the uncertainty of the threshold, a percentile estimated from v held-out images. The
        error is exact to first order if samples and held-out images follow the same distribution.
        """
        share = max(self.close_share, QUANTILE)
        return math.sqrt(share * (1 - share) * (1 / len(self.distances) + 1 / len(self.validation_distances)))


def nearest_training(samples: Tensor, train: Tensor, validation: Tensor, *, num_pairs: int = NUM_PAIRS) -> Memorisation:
    """Find the nearest training image of each sample, and compare the distances with those of held-out images.

        d(x) = min_i (1 - cos(x, train_i));   close: d(x) < the 1st percentile of d over the held-out images

    The cosine distance is used because the features of low-contrast images have small norms, so their Euclidean
    distances are all small. Copies of training images in the validation split lower the threshold, possibly to 0,
    in which case no sample counts as close. Remove the copies first.

    The rule is our own, inspired by Somepalli et al. 2023, arXiv:2212.03860, who compare similarities between samples
    and training images with similarities within the data.

    Args:
        samples, train, validation: Features [n, d], [m, d] and [v, d].
    """
    distances, nearest = nearest_by_cosine(samples, train)
    validation_distances, _ = nearest_by_cosine(validation, train)
    threshold = validation_distances.quantile(QUANTILE).item()
    closest = distances.argsort(stable=True)[:num_pairs]
    return Memorisation(distances, nearest, validation_distances, threshold, closest)


def nearest_by_cosine(queries: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosine distance from each query to the nearest row of the gallery, in float64, and the row's index."""
    queries, gallery = (F.normalize(features.double(), dim=1) for features in (queries, gallery))
    minima = [(1 - rows @ gallery.T).min(dim=1) for rows in queries.split(chunk_size(len(gallery)))]
    return torch.cat([chunk.values for chunk in minima]).clamp(min=0), torch.cat([chunk.indices for chunk in minima])


def plot_nearest(samples: ImageSet, images: ImageData, memorisation: Memorisation) -> Image.Image:
    """Plot the closest pairs of samples and training images with their distances, in ascending order."""
    closest, distances = memorisation.closest_samples.tolist(), memorisation.distances
    rows = images.train_indices[memorisation.nearest_rows[memorisation.closest_samples].numpy()].tolist()
    cells, captions = [], []
    for sample, row in zip(closest, rows, strict=True):
        cells += to_pil(samples.batch([sample])) + to_pil(images.batch([row]))
        captions += [f"sample {sample}, distance {distances[sample]:.3f}", f"training: {image_text(images, row)}"]
    title = f"The {len(closest)} closest pairs of {len(distances)} samples and the training images of {images.name}"
    return grid(cells, captions, columns=2 * PAIRS_PER_ROW, title=title)
