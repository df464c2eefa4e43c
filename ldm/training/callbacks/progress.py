"""Training progress bar, which also logs the training speed."""

import math
import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import Progress, TextColumn

from ldm.progress import progress
from ldm.training.callbacks.speed import Speed, peak_memory_gb
from ldm.training.optim.budget import Budget


class ProgressBar(Callback):
    """Shows the budget spent, remaining time, loss and images/s. Without a terminal, prints a line every 30 seconds."""

    LINE_INTERVAL_S = 30.0
    REFRESH_INTERVAL_S = 0.2

    def __init__(self, budget: Budget, batch_size: int, log_every: int, title: str) -> None:
        self.budget, self.batch_size, self.log_every, self.title = budget, batch_size, log_every, title
        self._bar: Progress | None = None
        self._last_shown = self._window_start = self._validation_start = 0.0
        self._window_step = 0
        self.images_per_s = math.nan
        self.speed: Speed | None = None

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._last_shown = self._window_start = time.perf_counter()
        self._window_step = trainer.global_step
        if sys.stderr.isatty():
            columns = "step {task.fields[step]}  loss {task.fields[loss]}  {task.fields[rate]}"
            self._bar = progress(TextColumn(columns), transient=False)
            self._bar.start()
            self._bar.add_task(self.title, total=1.0, step=0, loss="-", rate="")

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, now = trainer.global_step, time.perf_counter()
        if step % self.log_every == 0 and step > self._window_step:
            self.images_per_s = (step - self._window_step) * self.batch_size / (now - self._window_start)
            self._window_step, self._window_start = step, now
            metrics = {"images_per_s": self.images_per_s}
            if (memory := peak_memory_gb()) is not None:
                metrics["peak_memory_gb"] = memory
            if self.speed is not None:
                metrics |= self.speed.metrics(self.images_per_s, getattr(module, "adversarial_on", False))
            # Log directly, because Lightning's `log` adds overhead to every step.
            for logger in trainer.loggers:
                logger.log_metrics({f"train/{name}": value for name, value in metrics.items()}, step - 1)
        interval_s = self.REFRESH_INTERVAL_S if self._bar else self.LINE_INTERVAL_S
        if now - self._last_shown >= interval_s and trainer.is_global_zero:
            self._last_shown = now
            self._show(trainer.global_step, float(outputs["loss"]))

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._window_start += time.perf_counter() - self._validation_start

    def _show(self, step: int, loss: float) -> None:
        fraction = self.budget.progress(step)
        rate = "" if math.isnan(self.images_per_s) else f"{self.images_per_s:.0f} images/s"  # unknown at first
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=fraction, step=step, loss=f"{loss:.4f}", rate=rate)
        else:
            minutes, seconds = divmod(round(self.budget.elapsed_s * (1 - fraction) / max(fraction, 1e-9)), 60)
            status = f"{fraction:4.0%}, {minutes}:{seconds:02d} left"
            fields = [status, f"step {step}", f"loss {loss:.4f}", *([rate] if rate else [])]
            print(f"{self.title}: {', '.join(fields)}", flush=True)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None
