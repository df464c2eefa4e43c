"""The checkpoint for resuming, read with weights_only=True."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ldm.errors import UserError
from ldm.untrusted import first_line


class LastCheckpoint(Checkpoint):
    """Saves checkpoints/last.ckpt every `every_s` seconds, between optimizer steps, and when training ends or is ended.

    Lightning's ModelCheckpoint with a time interval saves neither at the end nor at Ctrl-C or SIGTERM.
    """

    def __init__(self, folder: Path, every_s: float) -> None:
        self.path, self.every_s = folder / "checkpoints" / "last.ckpt", every_s
        self._saved_at = 0.0
        self._between_steps = False

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._between_steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not self._between_steps:
            return  # gradients of a half-accumulated step are in no checkpoint
        if trainer.strategy.reduce_boolean_decision(time.monotonic() - self._saved_at >= self.every_s, all=False):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(trainer)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        alone = isinstance(exception, KeyboardInterrupt) and trainer.world_size == 1
        if self._between_steps and (alone or isinstance(exception, SIGTERMException)):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        # beside and renamed: a full disk or a kill leaves the last one whole
        partial = self.path.with_name("last.partial")
        try:
            trainer.save_checkpoint(partial, weights_only=False)
            if trainer.is_global_zero:
                partial.replace(self.path)
        finally:
            if trainer.is_global_zero:
                partial.unlink(missing_ok=True)
        self._saved_at = time.monotonic()


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


def progress_of(checkpoint: str | None) -> tuple[int, float]:
    """Optimizer steps and seconds of training in a checkpoint."""
    if checkpoint is None:
        return 0, 0.0
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch, zip and pickle each raise their own
        raise UserError(f"resume={checkpoint} is no checkpoint of a run of yours ({first_line(error)}).") from error
    return int(state["global_step"]), float(state["callbacks"].get("Budget", {}).get("spent_s", 0.0))
