"""Run folders of finished training runs, created without training."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.data.images import ImageData
from ldm.runs.run import Run


def finished_run(folder: Path, stage: str, images: ImageData, model: Any = None, **facts: Any) -> Run:
    """Create the folder of a finished run on `images`, with an autoencoder if a model is given."""
    data = {"data_fingerprint": images.fingerprint, "data_cache": str(images.path), "val_fraction": images.val_fraction}
    facts = {"stage": stage, **data, "finished": 1.0, **facts}
    run = Run.create(folder, OmegaConf.create({}), facts)
    if model is not None:
        Autoencoder(model).save(run.autoencoder_folder)
    return run
