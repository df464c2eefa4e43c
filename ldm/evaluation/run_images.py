"""Which of a run's images a measurement looks at."""

import numpy as np

from ldm.data.images import ImageData
from ldm.data.order import derive_seed
from ldm.errors import UserError
from ldm.run import Run

SPLITS = ("val", "train")


def choose_images(run: Run, split: str, num_images: int, seed: int) -> tuple[ImageData, np.ndarray]:
    """The images of a run, and the indices of those that the seed chooses from a split.

    Raises:
        UserError: an unknown split, fewer than two images, numbers that are none.
    """
    if split not in SPLITS:
        raise UserError(f"split={split} is unknown. Choose one of: {', '.join(SPLITS)}.")
    for key, value in (("num_images", num_images), ("seed", seed)):
        if type(value) is not int:
            raise UserError(f"{key}={value} must be a whole number.")
    if num_images < 2:
        raise UserError(f"num_images={num_images} must be at least 2, for a standard error.")
    images = run.image_data()
    members = images.val_indices if split == "val" else images.train_indices
    if len(members) < 2:
        raise UserError(
            f"The {split} split of {images.name} holds {len(members)} image, and a standard error needs 2. Choose "
            f"split={'train' if split == 'val' else 'val'}, or train with a larger data.val_fraction."
        )
    return images, np.random.default_rng(derive_seed(seed, 2)).permutation(members)[:num_images]
