"""Checkpoints for resuming: last and best, read with weights_only=True."""

from datetime import timedelta
from pathlib import Path

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from ldm.errors import UserError


def checkpoints(folder: Path, every_s: float) -> list[Callback]:
    """Save `last.ckpt` every so many seconds and at the end."""
    return [
        ModelCheckpoint(
            dirpath=folder / "checkpoints",
            filename="last",
            train_time_interval=timedelta(seconds=every_s),
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
    ]


def find_checkpoint(folder: Path, resume: bool | str | None) -> str | None:
    """The checkpoint to continue from: of this run with resume=true, or the named file; None to start anew.

    Raises:
        UserError: there is none.
    """
    if not resume:
        return None
    path = folder / "checkpoints" / "last.ckpt" if resume in (True, "true") else Path(str(resume)).expanduser()
    if not path.is_file():
        raise UserError(f"resume={resume}: there is no checkpoint {path}. Start anew without resume=.")
    return str(path)
