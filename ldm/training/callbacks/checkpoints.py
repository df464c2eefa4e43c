"""Checkpoints for resuming, saved atomically between optimizer steps. The newest few and the best are kept."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from ldm.errors import UserError
from ldm.files.atomic import clear_partials
from ldm.runs.checkpoints import FOLDER, Manifest, list_checkpoints, prune
from ldm.runs.disk import warn_on_write_error
from ldm.runtime import signals
from ldm.runtime.random_state import random_state, restore_random_state
from ldm.training.callbacks.checkpoint_io import AtomicCheckpointIO
from ldm.training.optim.budget import Budget

MONITORED_METRIC = "val/loss"
RESTART_COUNTS = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
"""Progress counts that make Lightning repeat a validation pass from its first batch."""


class StopTraining(Exception):
    """Raised after a signal once the current step is complete, so that a checkpoint can be saved."""

    def __init__(self, signal: int) -> None:
        self.signal = signal
        super().__init__(f"stopped by signal {signal}")


class Checkpoints(Checkpoint):
    """Saves a checkpoint every `interval_s` seconds, when the validation loss improves, at the end, and on a signal.

    Checkpoints are only saved between steps. The newest `keep_last` checkpoints and the one with the lowest validation
    loss are kept. If a save fails during training, earlier checkpoints are kept and the save is retried later. If a run
    is stopped during validation, the whole validation pass is repeated on resume.

    Args:
        folder: The run folder.
        budget: Tracks the training time. Its `agreement` lets the ranks decide together when to save and stop.
        resume_from: Checkpoint to resume from. Later checkpoints in the run folder are deleted after the first save.
        on_saved: Called on rank 0 after each checkpoint has been saved.
    """

    def __init__(
        self,
        folder: Path,
        budget: Budget,
        interval_s: float,
        *,
        keep_last: int = 2,
        stage: str = "",
        resume_from: Manifest | None = None,
        on_saved: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.budget, self.interval_s = folder / FOLDER, budget, interval_s
        self.keep_last, self.stage, self.resume_from = keep_last, stage, resume_from
        self.on_saved = on_saved
        self.last_saved: Manifest | None = None
        """Newest checkpoint saved since training started or resumed. Set only on rank 0."""
        self.is_unsafe_for_rollback: Callable[[], bool] = lambda: False
        """Returns True if a rollback must not restore the current weights. Such weights are saved only at the end of
        training and on a signal."""
        is_same_run = resume_from is not None and resume_from.path.parent.resolve() == self.folder.resolve()
        self._saved_step = resume_from.step if resume_from is not None and is_same_run else -1
        self._io = AtomicCheckpointIO()
        self._saved_paths: set[Path] = set()
        self._training = self._between_steps = self._before_step = False
        self._improved = False
        self._saved_at, self._stop_signal = 0.0, 0
        self._validation_random_state: dict[str, Any] | None = None
        """Random state before the current validation; None outside validation."""
        self._states_to_restore: list[dict[str, Any]] | None = None
        budget.agreement.register("save", self._is_due)
        budget.agreement.register("signal", lambda: signals.pending() or 0)
        budget.agreement.register("improved", lambda: self._improved)

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = self._io
        # Without this line, Lightning's signal handlers would be active until training starts. Its handler for SIGTERM
        # waits for the other ranks immediately, possibly in the middle of another collective.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        signals.install_handlers()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            clear_partials(self.folder)
        self._saved_at, self._training = time.monotonic(), True
        signals.defer()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save before the step, because the previous step is only complete after the module's `on_train_batch_end`."""
        if self._states_to_restore is not None:  # after Lightning's setup, which can advance these generators
            states = self._states_to_restore
            restore_random_state(states[trainer.global_rank % len(states)], trainer.strategy.root_device)
            self._states_to_restore = None
        if batch_idx % trainer.accumulate_grad_batches:
            return  # checkpoints do not contain the gradients of a partly accumulated step
        decisions = self.budget.agreement.values
        # A single process can react immediately to a signal that has just arrived.
        stop_signal = decisions.get("signal", 0) if trainer.world_size > 1 else signals.pending()
        self._before_step = True
        if stop_signal:
            raise StopTraining(stop_signal)
        if decisions.get("save") and self._saved_step != trainer.global_step:
            self._save(trainer, "interval")
        self._before_step = False

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._between_steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        self._stop_signal = self.budget.agreement.values.get("signal", 0)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        signals.defer()
        self._validation_random_state = random_state(trainer.strategy.root_device)
        self._stop_in_validation()

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if not self._stop_signal:
            self._stop_signal = self.budget.agreement.update(trainer)["signal"]
        self._stop_in_validation()

    def _stop_in_validation(self) -> None:
        if self._stop_signal and (self._between_steps or not self._training):
            raise StopTraining(self._stop_signal)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self._validation_random_state is not None:  # validation must not change the random numbers of training
            restore_random_state(self._validation_random_state, trainer.strategy.root_device)
        self._validation_random_state = None
        if not (self._training and self._between_steps):
            return
        monitored = float(trainer.callback_metrics.get(MONITORED_METRIC, math.nan))
        metric = monitored if math.isfinite(monitored) else None
        saved_metrics = [manifest.figure for manifest in self.lineage() if manifest.figure is not None]
        is_better = metric is not None and metric < min(saved_metrics, default=math.inf)
        self._improved = trainer.is_global_zero and is_better and not self.is_unsafe_for_rollback()
        decisions = self.budget.agreement.update(trainer)
        self._improved = False
        if decisions["improved"]:
            self._save(trainer, "validation", metric, best=True)
        elif decisions["save"]:
            self._save(trainer, "interval", metric)
        if decisions["signal"]:
            raise StopTraining(decisions["signal"])

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self._saved_step != trainer.global_step:
            self._save(trainer, "end")
        self._training = False

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, StopTraining) and self._training and self._saved_step != trainer.global_step:
            self._save(trainer, "signal")
        self._training = False

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = self._validation_random_state or random_state(trainer.strategy.root_device)
        states: list[Any] = [state] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(states, state)
        checkpoint["random"] = states
        checkpoint["step_offset"] = getattr(module, "step_offset", 0)  # saved here too for runs without a guard
        loops = checkpoint["loops"]["fit_loop"]
        if self._validation_random_state is not None:  # on resume, rerun the validation from its first batch
            val = loops["epoch_loop.val_loop.batch_progress"]
            val.update(total=dict(RESTART_COUNTS), current=dict(RESTART_COUNTS), is_last_batch=False)
        elif self._before_step:  # undo Lightning's count of the batch that is about to start
            batches = loops["epoch_loop.batch_progress"]
            for count in (batches["total"], batches["current"]):
                count["ready"] = count["completed"]
            interval = trainer.val_check_batch if trainer.enable_validation else None
            if interval and batches["total"]["ready"] % interval == 0:
                # Lightning counts this step again on resume, which would skip the validation.
                loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._states_to_restore = checkpoint.get("random")

    def _is_due(self) -> bool:
        return time.monotonic() - self._saved_at >= self.interval_s and not self.is_unsafe_for_rollback()

    def lineage(self) -> list[Manifest]:
        """Return the checkpoints up to `resume_from` and those saved since training started or resumed."""
        last = self.resume_from.sequence if self.resume_from is not None else -1
        manifests = list_checkpoints(self.folder)
        return [manifest for manifest in manifests if manifest.path in self._saved_paths or manifest.sequence <= last]

    def _save(self, trainer: Trainer, trigger: str, metric: float | None = None, *, best: bool = False) -> None:
        """Save a checkpoint. Call this on every rank: the strategy gathers the state and rank 0 writes it.

        Raises:
            UserError: The checkpoint could not be saved at the end of training or on a signal.
        """
        start, step = time.perf_counter(), trainer.global_step
        for logger in trainer.loggers:
            logger.save()  # write the rows now, because a resumed run does not log them again
        # Never overwrite a checkpoint: it cannot be replaced atomically together with its manifest.
        names = [f"step-{step:08d}", *(f"step-{step:08d}-{i}" for i in range(1, 100))]
        path = next(self.folder / f"{name}.ckpt" for name in names if not any(self.folder.glob(f"{name}.*")))
        trainer.save_checkpoint(path, weights_only=False)
        self._saved_at = time.monotonic()
        manifest = Manifest(
            path=path,
            stage=self.stage,
            step=step,
            trained_s=self.budget.elapsed_s,
            sequence=1 + max((manifest.sequence for manifest in list_checkpoints(self.folder)), default=0),
            sha256=self._io.sha256,
            bytes=self._io.bytes,
            saved=time.time(),
            save_s=round(time.perf_counter() - start, 4),
            why=trigger,
            monitored=MONITORED_METRIC,
            figure=metric,
            best=best,
        )
        failure = self._io.failure
        if trainer.is_global_zero and failure is None:
            try:
                manifest.write()
            except OSError as error:
                path.unlink(missing_ok=True)
                failure = error
        if trainer.strategy.reduce_boolean_decision(failure is not None, all=False):
            checkpoint = self.last_saved or self.resume_from
            fallback = f"{checkpoint.path} is kept" if checkpoint is not None else "no earlier checkpoint exists"
            reason = failure.strerror if failure is not None else "reported by rank 0"
            message = f"could not be saved in {self.folder} ({reason}); {fallback}."
            if trigger in ("end", "signal"):
                raise UserError(
                    f"The last checkpoint {message} Free some disk space, then repeat the command with resume=true."
                )
            if trainer.is_global_zero:
                retry = f"Training continues and retries every {self.interval_s:g} s."
                print(f"warning: a checkpoint {message} {retry}", flush=True)
            return
        self._saved_step = step
        if trainer.is_global_zero:
            self.last_saved = manifest
            self._saved_paths.add(path)
            self.on_saved()
            with warn_on_write_error(self.folder):
                prune(self.folder, self.lineage(), self.keep_last)
            for logger in trainer.loggers:
                logger.log_metrics(
                    {"checkpoint/size_mb": manifest.bytes / 1e6, "checkpoint/save_s": manifest.save_s}, step - 1
                )
