"""Runs as training leaves them, without training."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.data.images import ImageData
from ldm.runs.run import Run


def finished_run(place: Path, stage: str, images: ImageData, model: Any = None, **facts: Any) -> Run:
    """A run of these images in a folder, with an autoencoder around a model where one is given."""
    of_data = {"data_fingerprint": images.fingerprint, "data_cache": str(images.path)}
    known = {"stage": stage, **of_data, "val_fraction": images.val_fraction, "finished": 1.0, **facts}
    run = Run.create(place, OmegaConf.create({}), known)
    if model is not None:
        Autoencoder(model).save(run.autoencoder_folder)
    return run
