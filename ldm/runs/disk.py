"""The disk: whether it has room before training begins, and what may fail on it without an end."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from ldm.errors import UserError
from ldm.runs.checkpoints import FOLDER

_forgiven: set[Path] = set()


@contextmanager
def forgiving(file: Path) -> Iterator[None]:
    """Go on where a file cannot be written; said once for its folder."""
    try:
        yield
    except OSError as error:
        if file.parent not in _forgiven:
            _forgiven.add(file.parent)
            reason = error.strerror or error
            print(f"warning: {file}: {reason}. Training goes on without it.", flush=True)


def checkpoint_bytes(module: nn.Module) -> int:
    """About how large a checkpoint of a training module is: weights, their average, two moments of the optimizer; the
    same of a discriminator, but for the average."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    adversary = getattr(module, "adversary", None)
    against = [] if adversary is None else list(adversary.discriminator.parameters())
    return sum(value.nbytes for value in [*module.state_dict().values(), *3 * trained, *3 * against])


def require_room(folder: Path, module: nn.Module, keep_last: int) -> None:
    """The disk has room for the checkpoints that are kept and the one that is being written.

    Raises:
        UserError: saying how much is missing.
    """
    size = checkpoint_bytes(module)
    present = sum(file.stat().st_size for file in (folder / FOLDER).glob("*.ckpt"))
    count = keep_last + 2  # the best one, and the next while those before it are still there
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    if free + present < count * size:
        raise UserError(
            f"{folder} needs room for {count} checkpoints of about {size / 1e6:.0f} MB, and its disk has "
            f"{free / 1e6:.0f} MB left. Make room, choose another disk with runs_dir=, or keep fewer with "
            "trainer.keep_last=1."
        )
