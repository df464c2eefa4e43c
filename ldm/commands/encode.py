"""Encode a folder of images into latents in a safetensors file."""

import tempfile
from pathlib import Path

from omegaconf import DictConfig

from ldm.data.images import prepare
from ldm.data.sources.image_folder import ImageFolder
from ldm.latents.files import encode_file
from ldm.runs.run import Run
from ldm.runtime.device import choose_device


def encode_images(config: DictConfig) -> None:
    run = Run.open(config.run)
    autoencoder = run.autoencoder().to(choose_device(config.device))
    resolution = config.resolution or run.config()["data"]["resolution"]
    autoencoder.latent_shape(resolution)
    with tempfile.TemporaryDirectory() as cache:
        images = prepare(
            ImageFolder(config.images, caption_column=None),
            resolution=resolution,
            resize=config.resize,
            cache_dir=cache,
            val_fraction=0.0,
        )
        count = encode_file(autoencoder, images, Path(config.out).expanduser(), config.batch_size)
        del images
    print(f"{count} images of {resolution} px encoded to {config.out}")
