"""Disk checks before training, and writes whose failure does not stop it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from ldm.errors import UserError
from ldm.runs.checkpoints import FOLDER

_warned_folders: set[Path] = set()


@contextmanager
def warn_on_write_error(file: Path) -> Iterator[None]:
    """Ignore errors that occur while writing `file`, but print one warning per folder."""
    try:
        yield
    except OSError as error:
        if file.parent not in _warned_folders:
            _warned_folders.add(file.parent)
            reason = error.strerror or error
            print(f"warning: {file} cannot be written ({reason}). Training continues without it.", flush=True)


def checkpoint_bytes(module: nn.Module) -> int:
    """Estimate the size of a checkpoint: weights, EMA weights and two optimizer moments.

    If there is a discriminator, its weights and moments are included. It has no EMA weights.
    """
    trained_parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    adversary = getattr(module, "adversary", None)
    adversary_parameters = [] if adversary is None else list(adversary.discriminator.parameters())
    parameters = [*trained_parameters, *adversary_parameters]
    return sum(value.nbytes for value in [*module.state_dict().values(), *3 * parameters])


def require_disk_space(folder: Path, module: nn.Module, keep_last: int) -> None:
    """Check that the disk has enough space for the checkpoints to keep and the one being written.

    Raises:
        UserError: with the required and the free space.
    """
    size = checkpoint_bytes(module)
    existing_bytes = sum(file.stat().st_size for file in (folder / FOLDER).glob("*.ckpt"))
    count = keep_last + 2  # plus the best one, and the next one, which is written before an old one is deleted
    free_bytes = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    if free_bytes + existing_bytes < count * size:
        raise UserError(
            f"{folder} needs disk space for {count} checkpoints of about {size / 1e6:.0f} MB each, but only "
            f"{free_bytes / 1e6:.0f} MB are free. Free some space, choose another disk with runs_dir=, or keep fewer "
            "checkpoints with trainer.keep_last=1."
        )
