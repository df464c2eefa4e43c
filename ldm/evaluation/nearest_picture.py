"""Samples beside the training images that they are nearest to."""

from PIL import Image

from ldm.data.images import ImageData
from ldm.evaluation.feature_extraction import ImageSet
from ldm.evaluation.memorisation import Memorisation
from ldm.evaluation.reconstruction_picture import shows
from ldm.pictures import grid, to_pil

PAIRS_PER_ROW = 4


def draw(samples: ImageSet, images: ImageData, found: Memorisation) -> Image.Image:
    """The closest pairs, nearest first, three numbers each: which sample, how near, what the training image shows."""
    chosen = found.closest.tolist()
    rows = images.train_indices[found.nearest[found.closest].numpy()].tolist()
    pictures, captions = [], []
    for sample, row in zip(chosen, rows, strict=True):
        pictures += to_pil(samples.batch([sample])) + to_pil(images.batch([row]))
        captions += [f"sample {sample}, distance {found.distances[sample]:.3f}", f"training: {shows(images, row)}"]
    title = f"The {len(chosen)} closest pairs of {len(found.distances)} samples and {images.name}'s training images"
    return grid(pictures, captions, columns=2 * PAIRS_PER_ROW, title=title)
