"""Prepare the data set specified in a config."""

from omegaconf import DictConfig

from ldm.cli.main import construct
from ldm.data.images import ImageData, prepare


def prepare_images(data: DictConfig) -> ImageData:
    """Return the images selected by a config's `data` group, preparing and caching them if necessary."""
    keys = ("resolution", "resize", "cache_dir", "val_fraction", "max_bad_fraction", "max_pixels", "bit_depth")
    return prepare(construct(data.source), **{key: data[key] for key in keys})
