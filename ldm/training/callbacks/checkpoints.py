"""Checkpoints for resuming: saved whole between optimizer steps, the last ones and the best one kept."""

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
from ldm.runs.checkpoints import FOLDER, Manifest, manifests, prune
from ldm.runs.disk import forgiving
from ldm.runtime import signals
from ldm.runtime.random_state import random_state, restore_random_state
from ldm.training.callbacks.checkpoint_io import WholeCheckpointIO
from ldm.training.optim.budget import Budget

MONITORED = "val/loss"
NOT_BEGUN = {"ready": 1, "started": 1, "processed": 0, "completed": 0}


class StopTraining(Exception):
    """A signal asks to stop, and the step is finished: what is saved now can be continued."""

    def __init__(self, signal: int) -> None:
        self.signal = signal
        super().__init__(f"stopped by signal {signal}")


class Checkpoints(Checkpoint):
    """Saves between optimizer steps: every `every_s` seconds, where validation improves, at the end, and at a signal.

    Keeps the last `keep_last` and the best by the monitored figure. A save that fails while training leaves those
    before it and is tried again later. What is stopped amid a validation begins it anew.

    Args:
        folder: The run folder.
        budget: Its seconds are noted; what ranks decide together goes through its `agreement`.
        resumed: What training continues from; what that run saved afterwards is deleted once this one saves.
        on_saved: Called on the first rank after every checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        budget: Budget,
        every_s: float,
        *,
        keep_last: int = 2,
        stage: str = "",
        resumed: Manifest | None = None,
        on_saved: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.budget, self.every_s = folder / FOLDER, budget, every_s
        self.keep_last, self.stage, self.resumed = keep_last, stage, resumed
        self.on_saved = on_saved
        self.saved: Manifest | None = None
        """The newest that this training saved, as the first rank knows it."""
        self.withheld: Callable[[], bool] = lambda: False
        """Whether the weights of this moment are none to go back to; they are saved at the end and at a signal only."""
        goes_on = resumed is not None and resumed.path.parent.resolve() == self.folder.resolve()
        self._saved_step = resumed.step if resumed is not None and goes_on else -1
        self._io = WholeCheckpointIO()
        self._own: set[Path] = set()
        self._training = self._between_steps = self._before_step = False
        self._improved = False
        self._saved_at, self._stop = 0.0, 0
        self._random: dict[str, Any] | None = None
        """The random state from before a validation, while one goes on."""
        self._restored: list[dict[str, Any]] | None = None
        budget.agreement.ask("save", self._is_due)
        budget.agreement.ask("signal", lambda: signals.pending() or 0)
        budget.agreement.ask("improved", lambda: self._improved)

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = self._io
        # Lightning's handlers would stand until training begins, and its own for SIGTERM waits for the other ranks
        # where it was called, which may be amid another of their conversations
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        signals.install_handlers()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            clear_partials(self.folder)
        self._saved_at, self._training = time.monotonic(), True
        signals.hold()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before a step, when the last one is over: a module's own hooks come after a callback's."""
        if self._restored is not None:  # not before: what Lightning sets up may draw from the global generators
            states = self._restored
            restore_random_state(states[trainer.global_rank % len(states)], trainer.strategy.root_device)
            self._restored = None
        if batch_idx % trainer.accumulate_grad_batches:
            return  # gradients of a half-accumulated step are in no checkpoint
        answers = self.budget.agreement.answers
        # alone, a signal of this very moment counts too
        stop = answers.get("signal", 0) if trainer.world_size > 1 else signals.pending()
        self._before_step = True
        if stop:
            raise StopTraining(stop)
        if answers.get("save") and self._saved_step != trainer.global_step:
            self._save(trainer, "interval")
        self._before_step = False

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._between_steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        self._stop = self.budget.agreement.answers.get("signal", 0)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        signals.hold()
        self._random = random_state(trainer.strategy.root_device)
        self._stop_in_validation()

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if not self._stop:
            self._stop = self.budget.agreement.decide(trainer)["signal"]
        self._stop_in_validation()

    def _stop_in_validation(self) -> None:
        if self._stop and (self._between_steps or not self._training):
            raise StopTraining(self._stop)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self._random is not None:  # training draws on as if there had been no validation
            restore_random_state(self._random, trainer.strategy.root_device)
        self._random = None
        if not (self._training and self._between_steps):
            return
        monitored = float(trainer.callback_metrics.get(MONITORED, math.nan))
        figure = monitored if math.isfinite(monitored) else None
        known = [manifest.figure for manifest in self.branch() if manifest.figure is not None]
        better = figure is not None and figure < min(known, default=math.inf)
        self._improved = trainer.is_global_zero and better and not self.withheld()
        answers = self.budget.agreement.decide(trainer)
        self._improved = False
        if answers["improved"]:
            self._save(trainer, "validation", figure, best=True)
        elif answers["save"]:
            self._save(trainer, "interval", figure)
        if answers["signal"]:
            raise StopTraining(answers["signal"])

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self._saved_step != trainer.global_step:
            self._save(trainer, "end")
        self._training = False

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, StopTraining) and self._training and self._saved_step != trainer.global_step:
            self._save(trainer, "signal")
        self._training = False

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        own = self._random or random_state(trainer.strategy.root_device)
        every: list[Any] = [own] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(every, own)
        checkpoint["random"] = every
        checkpoint["step_offset"] = getattr(module, "step_offset", 0)  # also where no guard is there to save it
        loops = checkpoint["loops"]["fit_loop"]
        if self._random is not None:  # to be begun anew: Lightning would validate on the batches that were left
            val = loops["epoch_loop.val_loop.batch_progress"]
            val.update(total=dict(NOT_BEGUN), current=dict(NOT_BEGUN), is_last_batch=False)
        elif self._before_step:  # as at the end of the last batch: Lightning has counted the next one already
            batches = loops["epoch_loop.batch_progress"]
            for count in (batches["total"], batches["current"]):
                count["ready"] = count["completed"]
            interval = trainer.val_check_batch if trainer.enable_validation else None
            if interval and batches["total"]["ready"] % interval == 0:
                loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # counted where validation is skipped

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get("random")

    def _is_due(self) -> bool:
        return time.monotonic() - self._saved_at >= self.every_s and not self.withheld()

    def branch(self) -> list[Manifest]:
        """What this run saved and what it continues, not what was saved after the point that it went back to."""
        last = self.resumed.sequence if self.resumed is not None else -1
        return [found for found in manifests(self.folder) if found.path in self._own or found.sequence <= last]

    def _save(self, trainer: Trainer, why: str, figure: float | None = None, *, best: bool = False) -> None:
        """On every rank: the strategy gathers the state, the first rank writes it.

        Raises:
            UserError: training ends here, and the disk does not take it.
        """
        began, step = time.perf_counter(), trainer.global_step
        for logger in trainer.loggers:
            logger.save()  # the rows up to here are never logged again
        # never over another: checkpoint and manifest cannot be replaced as one
        names = [f"step-{step:08d}", *(f"step-{step:08d}-{i}" for i in range(1, 100))]
        path = next(self.folder / f"{name}.ckpt" for name in names if not any(self.folder.glob(f"{name}.*")))
        trainer.save_checkpoint(path, weights_only=False)
        self._saved_at = time.monotonic()
        manifest = Manifest(
            path=path,
            stage=self.stage,
            step=step,
            trained_s=self.budget.elapsed_s,
            sequence=1 + max((known.sequence for known in manifests(self.folder)), default=0),
            sha256=self._io.sha256,
            bytes=self._io.bytes,
            saved=time.time(),
            save_s=round(time.perf_counter() - began, 4),
            why=why,
            monitored=MONITORED,
            figure=figure,
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
            last = self.saved or self.resumed
            kept = f"{last.path} is kept" if last is not None else "nothing was saved before"
            reason = failure.strerror if failure is not None else "says the first process"
            said = f"cannot be saved in {self.folder} ({reason}); {kept}."
            if why in ("end", "signal"):
                raise UserError(
                    f"The last checkpoint {said} Make room, then go on with the same command and resume=true."
                )
            if trainer.is_global_zero:
                again = f"Training goes on, and tries again every {self.every_s:g} s."
                print(f"warning: a checkpoint {said} {again}", flush=True)
            return
        self._saved_step = step
        if trainer.is_global_zero:
            self.saved = manifest
            self._own.add(path)
            self.on_saved()
            with forgiving(self.folder):
                prune(self.folder, self.branch(), self.keep_last)
            for logger in trainer.loggers:
                logger.log_metrics(
                    {"checkpoint/size_mb": manifest.bytes / 1e6, "checkpoint/save_s": manifest.save_s}, step - 1
                )
