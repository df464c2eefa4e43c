"""Encode an image, or a folder of images, into latents in a safetensors file."""

import shutil
import tempfile
from pathlib import Path

from omegaconf import DictConfig

from ldm.data.cache import count
from ldm.data.images import prepare
from ldm.data.sources.image_folder import ImageFolder
from ldm.latents.files import encode_file
from ldm.runs.run import Run
from ldm.runtime.device import choose_device

MAX_LISTED_FILES = 20


def encode_images(config: DictConfig) -> None:
    run = Run.open(config.run)
    autoencoder = run.autoencoder().to(choose_device(config.device))
    resolution = config.resolution or run.config()["data"]["resolution"]
    autoencoder.latent_shape(resolution)
    path = Path(config.images).expanduser()
    with tempfile.TemporaryDirectory() as scratch:
        if path.is_file():
            folder = Path(scratch, "images")
            folder.mkdir()
            shutil.copy(path, folder)
        images = prepare(
            ImageFolder(folder if path.is_file() else path, caption_column=None),
            resolution=resolution,
            resize=config.resize,
            cache_dir=Path(scratch, "cache"),
            val_fraction=None,
            max_bad_fraction=None,
        )
        num_encoded = encode_file(autoencoder, images, Path(config.out).expanduser(), config.batch_size)
        skipped_files = images.quarantine()
        del images
    print(f"encoded {count(num_encoded, 'image')} at {resolution} px to {config.out}")
    for entry in skipped_files[:MAX_LISTED_FILES]:
        print(f"skipped {entry['name']}: {entry['reason']}")
    if len(skipped_files) > MAX_LISTED_FILES:
        print(f"skipped {len(skipped_files) - MAX_LISTED_FILES} more unreadable images")
