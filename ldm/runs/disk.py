"""The disk: whether it has room and can be written before training begins, and what may fail on it without an end."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

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
    """About how large a checkpoint of a training module is: weights, their average, two moments of the optimizer."""
    weights = _num_bytes(module.state_dict().values())
    trained = _num_bytes(p for p in module.parameters() if p.requires_grad)
    adversary = getattr(module, "adversary", None)
    game = 3 * _num_bytes(adversary.discriminator.parameters()) if adversary is not None else 0
    return weights + 3 * trained + game


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def require_room(folder: Path, module: nn.Module, keep_last: int) -> None:
    """The disk has room for the checkpoints that are kept and the one that is being written.

    Raises:
        UserError: saying how much is missing.
    """
    size = checkpoint_bytes(module)
    present = sum(file.stat().st_size for file in (folder / FOLDER).glob("*.ckpt"))
    count = keep_last + 2  # the best one, and the next while those before it are still there
    free = shutil.disk_usage(_existing(folder)).free
    if free + present < count * size:
        raise UserError(
            f"{folder} needs room for {count} checkpoints of about {size / 1e6:.0f} MB, and its disk has "
            f"{free / 1e6:.0f} MB left. Make room, choose another disk with runs_dir=, or keep fewer with "
            "trainer.keep_last=1."
        )


def require_writable(folder: Path) -> None:
    """A run folder, or the one that it will be made in, takes files.

    Raises:
        UserError: naming the folder and why it does not.
    """
    place = _existing(folder)
    probe = place / ".partial-probe"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{place} cannot be written ({error.strerror}). Choose another place for runs with runs_dir=."
        ) from error


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that there is."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())
