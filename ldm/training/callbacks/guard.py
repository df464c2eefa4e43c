"""Guard against bad training steps. It skips, counts and logs them, and rolls back after too many in a row.

A step is bad if one of its losses or its gradient is not finite, or if its gradient norm is a spike, that is, more than
`max_spike` times the running average. When a bad step is skipped, the weights and the optimizer's moments and step
counts do not change. The discriminator and the codebook (idle counts and restarts) skip the step as well. The
discriminator also skips a step if its own gradient is not finite. Skipped steps still count towards the budget, the
learning rate schedule and the data order, and the EMA is updated with the unchanged weights.

After `skips_before_rollback` consecutive skipped steps, training restores an earlier checkpoint and continues with new
batches: step k then trains on batch k + `offset` of the data order.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only
from pydantic import Field
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from ldm.errors import UserError
from ldm.rules import Count, Integer, Number, checked
from ldm.runs.checkpoints import Manifest
from ldm.runs.disk import warn_on_write_error
from ldm.training.callbacks.skip_step import MAX_FLOAT32, RunningNorm, StepStats, parameters_of, skip_step

print_on_rank_zero = rank_zero_only(print)


class RollBack(Exception):
    """Raised after too many consecutive skipped steps, to restore a checkpoint and continue with new batches.

    Args:
        first_skip: First of the consecutive skipped steps. A checkpoint with this number was saved before this step.
        step: Current step.
        tallies: The guard's counts, which persist across the rollback.
        average_norm: Running average of the gradient norm.
    """

    def __init__(self, first_skip: int, step: int, tallies: Mapping[str, Any], average_norm: float = 0.0) -> None:
        super().__init__(f"skipped all steps from step {first_skip} on")
        self.first_skip, self.step = first_skip, step
        self.tallies, self.average_norm = dict(tallies), average_norm

    def choose_checkpoint(self, checkpoints: Mapping[int, Manifest]) -> tuple[int, Manifest | None]:
        """Return the step and manifest of the newest checkpoint before the skipped steps, or (0, None) if none exists.

        The checkpoint restored by the previous rollback is a last resort, as its weights may have caused the skips.

        Args:
            checkpoints: Checkpoints by step.
        """
        candidates = [step for step in checkpoints if step <= self.first_skip]
        untried = [step for step in candidates if step != self.tallies["went_to"]]
        step = max(untried or candidates, default=0)
        return step, checkpoints.get(step)


class Guard(Callback):
    """Checks the losses and the gradient of every step. The module calls these checks through `module.guard`.

    Args:
        skip_log: JSON Lines file with one line per skipped step.
        image_names: Maps the index of a batch in the data order to the names of its images, for the log.
        max_spike: Largest allowed ratio of the gradient norm to its running average.
        warmup_steps: Number of steps before spike detection starts, and window of the running average.
        skips_before_rollback: Number of consecutive skipped steps that triggers a rollback.
        max_rollbacks: Maximum number of rollbacks per run.
        log_every: Number of steps between logged counts.
    """

    @checked
    def __init__(
        self,
        skip_log: Path,
        image_names: Callable[[int], Iterable[str]] = lambda batch: (),
        *,
        max_spike: Annotated[Number, Field(gt=1)] = 100.0,
        warmup_steps: Count = 100,
        skips_before_rollback: Count = 10,
        max_rollbacks: Annotated[Integer, Field(ge=0)] = 2,
        log_every: int = 50,
    ) -> None:
        self.skip_log, self.image_names, self.log_every = skip_log, image_names, log_every
        self.skips_before_rollback, self.max_rollbacks = skips_before_rollback, max_rollbacks
        self.running_norm = RunningNorm(max_spike, warmup_steps)
        self.tallies: dict[str, Any] = {"skipped_steps": 0, "rollbacks": 0, "offset": 0, "went_to": None}
        self.streak, self.first_skip = 0, 0
        self.skip = self._skip_second = torch.zeros((), dtype=torch.bool)
        """True if the current step is skipped. A scalar bool tensor on the device."""
        self._norm, self._limit = torch.zeros(()), MAX_FLOAT32
        self._losses: list[Tensor] = []
        self._unclipped_parameters: list[Tensor] = []
        self._restored_tallies: dict[str, Any] = {}
        self._restored_norm = 0.0
        self._pending_stats: StepStats | None = None
        self._step = 0

    @property
    def offset(self) -> int:
        """Number of batches skipped over by rollbacks."""
        return self.tallies["offset"]

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped so far, including those before a resume or a rollback."""
        return self.tallies["skipped_steps"] + self.skipped_last_step

    @property
    def skipped_last_step(self) -> bool:
        """True if the last step was skipped. Reading this synchronises with the device."""
        return self._pending_stats is not None and self._pending_stats.is_bad

    def setup(self, trainer: Trainer, module: Any, stage: str) -> None:
        module.guard = self

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self._step = trainer.global_step
        clipped = {id(parameter) for parameter in module.trained.parameters()}
        self._unclipped_parameters = [p for p in parameters_of(trainer.optimizers[0]) if id(p) not in clipped]

    def record_loss(self, loss: Tensor) -> Tensor:
        """Record and return the loss of a micro-batch. A non-finite loss makes the gradient NaN on all ranks."""
        value = loss.detach()
        self._losses.append(value)
        return loss * (1 + 0 * value)

    def check_gradient(self, optimizer: Optimizer, norm: Tensor) -> None:
        """Skip the optimizer's next step if the gradient norm is a spike or not finite. Call this after backward."""
        for parameter in self._unclipped_parameters:  # for example, a learned loss scale
            if parameter.grad is not None:
                norm = norm + 0 * parameter.grad.sum()
        self._norm, self._limit = norm.detach(), self.running_norm.limit
        self.skip = self._skip_second = ~(self._norm <= self._limit)  # True for NaN as well
        skip_step(optimizer, self.skip)

    def check_second_optimizer(self, optimizer: Optimizer) -> None:
        """Skip the second optimizer's step if the first step is skipped or the second gradient norm is not finite."""
        norm = get_total_norm([p.grad for p in parameters_of(optimizer) if p.grad is not None])
        self._skip_second = self.skip | ~(norm <= MAX_FLOAT32)
        skip_step(optimizer, self._skip_second)

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:
            return  # still accumulating gradients
        values = [value.float() for value in (self.skip, self._skip_second, self._norm, *self._losses)]
        stats = StepStats.send(self._step, self._limit, torch.stack(values))
        previous, self._pending_stats = self._pending_stats, stats
        self._losses.clear()
        self._step = trainer.global_step
        if previous is not None:
            self._count(previous)
        if trainer.global_step % self.log_every == 0 or (previous is not None and previous.is_bad):
            self._log(trainer, self.tallies["skipped_steps"])
        if self.streak >= self.skips_before_rollback:
            self._roll_back(trainer)

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        if self._pending_stats is not None and self.skipped_last_step:  # a resumed run adds this step to the tallies
            self._log_skip(self._pending_stats)
            self._log(trainer, self.skipped_steps)

    def resume_after(self, rollback: RollBack, step: int) -> None:
        """Restore the counts after a rollback to `step`, and advance the data order past the skipped batches."""
        num_skipped = rollback.step - step
        self._restored_tallies = {
            **rollback.tallies,
            "rollbacks": rollback.tallies["rollbacks"] + 1,
            "offset": rollback.tallies["offset"] + num_skipped,
            "went_to": step,
        }
        self.tallies, self._restored_norm = dict(self._restored_tallies), rollback.average_norm
        self._write({"step": rollback.first_skip, "rolled_back_to": step, "batches_skipped": num_skipped})
        print_on_rank_zero(
            f"skipped {self.skips_before_rollback} steps in a row from step {rollback.first_skip} on: rolling back "
            f"to step {step} and continuing with the next batches "
            f"(rollback {self.tallies['rollbacks']} of {self.max_rollbacks}; see {self.skip_log})",
            flush=True,
        )

    def _count(self, stats: StepStats) -> None:
        """Update the counts and the running norm with the statistics of a step. All devices do this one step late."""
        _, _, norm, *_ = stats.read()
        self.running_norm.add(norm)
        if not stats.is_bad:
            self.streak = 0
            return
        if self.streak == 0:
            self.first_skip = stats.step
        self.streak += 1
        self.tallies["skipped_steps"] += 1
        self._log_skip(stats)
        count = self.tallies["skipped_steps"]
        if math.log10(count).is_integer():  # the 1st, 10th, 100th
            print_on_rank_zero(f"skipped step {stats.step} ({count} skipped so far); see {self.skip_log}", flush=True)

    def _log_skip(self, stats: StepStats) -> None:
        """Append the statistics and the image names of a step to the skip log."""
        skipped_both, _, norm, *losses = stats.read()
        reason = "the discriminator's gradient is not finite"
        if skipped_both:
            reason = "spike" if math.isfinite(norm) else "the gradient is not finite"
            reason = reason if all(map(math.isfinite, losses)) else "the loss is not finite"
        batch = stats.step + self.offset
        self._write(
            {
                "step": stats.step,
                "batch": batch,
                "why": reason,
                "losses": [_to_json(loss) for loss in losses],
                "gradient_norm": _to_json(norm),
                "limit": stats.limit if stats.limit < MAX_FLOAT32 else None,
                "images": list(self.image_names(batch)),
            }
        )

    @rank_zero_only
    def _write(self, line: Mapping[str, Any]) -> None:
        """Append a line unless the log already contains it, because a resumed run can repeat logged steps."""
        text = json.dumps(line)
        with warn_on_write_error(self.skip_log):
            lines = self.skip_log.read_text(encoding="utf-8").splitlines() if self.skip_log.is_file() else []
            if text not in lines:
                self.skip_log.parent.mkdir(parents=True, exist_ok=True)
                with self.skip_log.open("a", encoding="utf-8") as file:
                    file.write(text + "\n")

    def _log(self, trainer: Trainer, skipped_steps: int) -> None:
        """Log the counts directly, because Lightning's `log` adds overhead to every step."""
        metrics = {"train/skipped_steps": skipped_steps, "train/rollbacks": self.tallies["rollbacks"]}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step - 1)

    def _roll_back(self, trainer: Trainer) -> None:
        """Raise RollBack, or a UserError with remedies if all rollbacks have been used."""
        if self.tallies["rollbacks"] < self.max_rollbacks:
            raise RollBack(self.first_skip, trainer.global_step, self.tallies, self.running_norm.mean)
        group, clip = trainer.optimizers[0].param_groups[0], trainer.gradient_clip_val
        raise UserError(
            f"Training diverged: {self.streak} steps in a row from step {self.first_skip} on had a non-finite loss, "
            f"a non-finite gradient, or a gradient norm over {self.running_norm.max_spike:g} times its running average"
            + (f", even after trainer.guard.max_rollbacks={self.max_rollbacks}. " if self.max_rollbacks else ". ")
            + f"Inspect the skipped steps and their images in {self.skip_log}, or try a lower optimizer.lr "
            f"(now {group.get('peak_lr', group['lr']):g}), a lower trainer.gradient_clip_val (now {clip}) or "
            f"trainer.precision=32-true (now {trainer.precision})."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state. The last step is stored separately, because it has not been counted yet."""
        pending = self._pending_stats
        return {
            "running": [self.running_norm.mean, self.running_norm.count],
            "tallies": dict(self.tallies),
            "streak": [self.streak, self.first_skip],
            "pending": pending and {"step": pending.step, "limit": pending.limit, "values": list(pending.read())},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        mean, self.running_norm.count = state_dict["running"]
        self.running_norm.mean = max(mean, self._restored_norm)  # norms as high as before the rollback are not spikes
        self.streak, self.first_skip = state_dict["streak"]
        self.tallies = {**state_dict["tallies"], **self._restored_tallies}
        self._pending_stats = StepStats(**state_dict["pending"]) if state_dict["pending"] else None


def load_step_offset(checkpoint: Path | None) -> int:
    """Return the number of batches that rollbacks had skipped over when the checkpoint was saved."""
    if checkpoint is None:
        return 0
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    guard = state["callbacks"].get("Guard")  # older checkpoints contain the offset only here
    return int(state.get("step_offset", guard["tallies"]["offset"] if guard else 0))


def _to_json(value: float) -> float | str:
    """Return a finite number unchanged, and nan or inf as text, because JSON has no such numbers."""
    return value if math.isfinite(value) else str(value)
