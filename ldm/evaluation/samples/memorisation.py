"""Does a model repeat its training images? How near samples are to them, beside how near held-out images are."""

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
from ldm.metrics.neighbours import part_size

PAIRS_PER_ROW = 4
QUANTILE = 0.01
"""Of the distances of held-out images: nearer than that is close."""
NUM_PAIRS = 12


@dataclass(frozen=True)
class Memorisation:
    """How near samples are to training images, in cosine distance, from 0 to 2."""

    distances: Tensor
    """Of each sample to its nearest training image, [n]."""
    nearest: Tensor
    """Row of that image, [n]."""
    validation_distances: Tensor
    """Of each held-out image to its nearest training image, [v]."""
    threshold: float
    """The 1st percentile of these."""
    closest: Tensor
    """Samples of the twelve closest pairs, nearest first, [12] or as many as there are."""

    @property
    def close_share(self) -> float:
        """Share of the samples that are nearer than the threshold; about 1 % of new images of the same kind are."""
        return (self.distances < self.threshold).double().mean().item()

    @property
    def close_share_standard_error(self) -> float:
        """sqrt(p (1 - p) (1 / n + 1 / v)), at p = 1 % at least: none found is not a certainty.

        The second part is of the threshold, which other held-out images would put elsewhere: v of them are few for
        their 1st percentile. Where samples and held-out images lie alike it is exact to first order.
        """
        share = max(self.close_share, QUANTILE)
        return math.sqrt(share * (1 - share) * (1 / len(self.distances) + 1 / len(self.validation_distances)))


def nearest_training(
    samples: Tensor, train: Tensor, own_validation: Tensor, *, num_pairs: int = NUM_PAIRS
) -> Memorisation:
    """The training image nearest to each sample, and whether it is nearer than held-out images make likely.

        d(x) = min_i (1 - cos(x, train_i));   close: d(x) < the 1st percentile of d over the held-out images

    The cosine: features of pale images are short, and all near each other by their difference. Held-out images that
    are copies of training images lower the threshold, down to 0, where nothing is close: clean the split first.
    Source: the rule is ours, in the way of Somepalli et al. 2023, arXiv:2212.03860, which compares the similarities
    of samples to training images with those within the data.

    Args:
        samples, train, own_validation: Features, [n, d], [m, d] and [v, d].
    """
    distances, nearest = nearest_by_cosine(samples, train)
    validation, _ = nearest_by_cosine(own_validation, train)
    closest = distances.argsort(stable=True)[:num_pairs]
    return Memorisation(distances, nearest, validation, validation.quantile(QUANTILE).item(), closest)


def nearest_by_cosine(queries: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine distance of each query to its nearest in the gallery, and which one that is; [q] and [q], in float64."""
    queries, gallery = (F.normalize(features.double(), dim=1) for features in (queries, gallery))
    found = [(1 - rows @ gallery.T).min(dim=1) for rows in queries.split(part_size(len(gallery)))]
    return torch.cat([part.values for part in found]).clamp(min=0), torch.cat([part.indices for part in found])


def plot_nearest(samples: ImageSet, images: ImageData, found: Memorisation) -> Image.Image:
    """The closest pairs, nearest first, three numbers each: which sample, how near, what the training image shows."""
    chosen = found.closest.tolist()
    rows = images.train_indices[found.nearest[found.closest].numpy()].tolist()
    pictures, captions = [], []
    for sample, row in zip(chosen, rows, strict=True):
        pictures += to_pil(samples.batch([sample])) + to_pil(images.batch([row]))
        captions += [f"sample {sample}, distance {found.distances[sample]:.3f}", f"training: {image_text(images, row)}"]
    title = f"The {len(chosen)} closest pairs of {len(found.distances)} samples and {images.name}'s training images"
    return grid(pictures, captions, columns=2 * PAIRS_PER_ROW, title=title)
