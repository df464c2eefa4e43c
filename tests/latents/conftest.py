"""Fixtures for the latents tests: 30 images of 8 x 8 pixels and a contract."""

import pytest

from ldm.data.images import ImageData, prepare
from ldm.data.sources.image_folder import ImageFolder
from ldm.latents.contract import LatentContract


@pytest.fixture(scope="module")
def images(make_images, tmp_path_factory) -> ImageData:
    folder = tmp_path_factory.mktemp("images")
    source = ImageFolder(make_images(folder / "squares", 30, size=8))
    return prepare(source, resolution=8, cache_dir=folder / "cache", val_fraction=0.2, progress=False)


@pytest.fixture
def contract(images) -> LatentContract:
    return LatentContract("a" * 64, images.fingerprint, 8, 4, 3, images.val_fraction, flip=False)
