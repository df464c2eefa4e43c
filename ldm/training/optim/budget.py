"""Training budget in steps or time, and the learning rate schedule that spans it."""

import math
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ldm.errors import UserError
from ldm.runtime.distributed import Agreement


def parse_duration(text: str | None) -> float | None:
    """Convert `HH:MM:SS` to seconds, or None to None.

    Raises:
        UserError: The text does not have this format.
    """
    if text is None:
        return None
    parts = str(text).split(":")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise UserError(f"trainer.max_time={text} must be HH:MM:SS, for example trainer.max_time=00:05:00.")
    hours, minutes, seconds = map(int, parts)
    return 3600.0 * hours + 60 * minutes + seconds


class Budget(Callback):
    """Ends training after `max_steps` or `max_time_s`, and decays the learning rate over the budget.

        lr(k) = peak * min(1, (k + 1) / warmup_steps) * decay(p)

    Here p is the fraction of the step or time budget already spent, whichever is larger. The decay is `linear` (1 - p),
    `cosine` ((1 + cos pi p) / 2) or `constant`. If a second phase starts at p = `second_phase_at`, each phase has its
    own warm-up and decay.

    After every step, the ranks use `agreement` to decide together whether the time is up.
    """

    DECAYS = {
        "linear": lambda p: 1 - p,
        "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
        "constant": lambda p: 1.0,
    }

    def __init__(
        self,
        max_steps: int = -1,
        max_time_s: float | None = None,
        warmup_steps: int = 0,
        decay: str = "linear",
        second_phase_at: float = 1.0,
    ) -> None:
        if decay not in self.DECAYS:
            raise UserError(f"optimizer.decay={decay} is unknown. Choose one of: {', '.join(self.DECAYS)}.")
        if max_steps < 0 and max_time_s is None:
            raise UserError("Training needs a budget. Set trainer.max_steps=N or trainer.max_time=HH:MM:SS.")
        self.max_steps, self.max_time_s, self.second_phase_at = max_steps, max_time_s, second_phase_at
        self.warmup_steps, self.decay = warmup_steps, self.DECAYS[decay]
        self.second_phase_step: int | None = None
        """First step of the second phase, once it has started."""
        self.spent_s, self._started_at = 0.0, 0.0
        self.agreement = Agreement()
        self.agreement.register("time_over", lambda: self.max_time_s is not None and self.elapsed_s >= self.max_time_s)

    def __str__(self) -> str:
        steps = [f"{self.max_steps} steps"] if self.max_steps > 0 else []
        minutes = [f"{self.max_time_s / 60:.4g} minutes"] if self.max_time_s is not None else []
        return " or ".join(steps + minutes)

    def expected_duration(self, step: int, seconds_per_step: float) -> str:
        """Return the expected remaining training time at `step`, as text."""
        seconds = math.inf
        if self.max_steps > 0:
            seconds = (self.max_steps - step) * seconds_per_step
        if self.max_time_s is not None:
            seconds = min(seconds, self.max_time_s - self.spent_s)
        seconds = max(0.0, seconds)
        return f"{seconds:.3g} seconds" if seconds < 60 else f"{seconds / 60:.3g} minutes"

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, including the time before a resume."""
        return self.spent_s + (time.perf_counter() - self._started_at if self._started_at else 0.0)

    def progress(self, step: int) -> float:
        """Return the fraction of the budget spent at a step."""
        step_fraction = step / self.max_steps if self.max_steps > 0 else 0.0
        time_fraction = self.elapsed_s / self.max_time_s if self.max_time_s else 0.0
        return min(1.0, max(step_fraction, time_fraction))

    def phase_progress(self, step: int) -> float:
        """Return the fraction of the current phase's budget spent at a step."""
        progress = self.progress(step)
        if self.second_phase_step is None:
            return min(1.0, progress / self.second_phase_at)
        return max(0.0, progress - self.second_phase_at) / (1 - self.second_phase_at)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._started_at = time.perf_counter()
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group.setdefault("peak_lr", group["lr"])  # stored in the group, so that it survives a resume
        if self.progress(trainer.global_step) < self.second_phase_at:  # the budget of the resumed run is larger
            self.second_phase_step = None

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if (
            self.second_phase_at < 1
            and self.second_phase_step is None
            and batch_idx % trainer.accumulate_grad_batches == 0
        ):
            is_due = self.progress(step) >= self.second_phase_at
            if trainer.strategy.reduce_boolean_decision(is_due, all=False):
                self.second_phase_step = step
                module.start_second_phase()
        module.in_second_phase = self.second_phase_step is not None
        phase_step = step - (self.second_phase_step or 0)
        factor = self.decay(self.phase_progress(step)) * min(1.0, (phase_step + 1) / max(1, self.warmup_steps))
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Never stop during gradient accumulation: the gradients would be lost and a resumed run would be out of phase.
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and self.agreement.update(trainer)["time_over"]:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.spent_s, self._started_at = self.elapsed_s, 0.0  # stop the clock

    def state_dict(self) -> dict[str, Any]:
        return {"spent_s": self.elapsed_s, "second_phase_step": self.second_phase_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.second_phase_step = state_dict.get("second_phase_step")  # missing from checkpoints of earlier versions
        self.spent_s = max(self.spent_s, state_dict["spent_s"])  # a rollback undoes steps, not the time spent
