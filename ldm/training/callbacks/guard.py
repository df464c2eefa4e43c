"""Steps whose numbers went wrong: left out, counted, noted, and after too many in a row taken back.

A step is bad where the loss of one of its batches or its gradient is not finite, or where the gradient's norm is a
spike: more than `max_spike` times its running average. The optimizer then leaves weights, moments and
step counts as they are. So do the discriminator and its optimizer, which also leave out gradients of their own that are
not finite, and the codebook's idle counts and restarts. The step still counts for the budget, the learning rate and the
order of the data, and the averaged weights take in the unchanged ones once more.

After `skips_before_rollback` such steps in a row the weights and all else that a checkpoint holds go back to one from
before them, and the data goes on with the batches that follow: step k is then on batch k + `offset` of the order.
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
from ldm.rules import Count, Number, Whole, checked
from ldm.runs.checkpoints import Manifest
from ldm.runs.disk import forgiving
from ldm.training.callbacks.skip_step import LARGEST, Numbers, RunningNorm, leave_out, parameters_of

say = rank_zero_only(print)


class RollBack(Exception):
    """Too many steps in a row went wrong: the weights go back to a checkpoint, the data goes on.

    Args:
        began: The first of the steps that were left out in a row; a checkpoint of that step was saved before it.
        at: The step that training has come to.
        tallies: What the guard counted until now, which stays counted.
        average: The gradient's norm that training had come to.
    """

    def __init__(self, began: int, at: int, tallies: Mapping[str, Any], average: float = 0.0) -> None:
        super().__init__(f"the steps from {began} on went wrong")
        self.began, self.at, self.tallies, self.average = began, at, dict(tallies), average

    def choose(self, checkpoints: Mapping[int, Manifest]) -> tuple[int, Manifest | None]:
        """Which of the checkpoints by step to go on from: the newest from before the steps that went wrong.

        Not the one that the last roll-back went to, where there is another: its weights may be what is wrong. Without
        any, step 0 and None.
        """
        before = [step for step in checkpoints if step <= self.began]
        others = [step for step in before if step != self.tallies["went_to"]]
        step = max(others or before, default=0)
        return step, checkpoints.get(step)


class Guard(Callback):
    """Watches over every step's numbers; the module hands them to it (`module.guard`).

    Args:
        notes: The file that each step left out is noted in, one line of JSON each.
        images: Names those that a batch of the order holds, for the notes.
        max_spike: Times the running average that the gradient's norm may be.
        warmup_steps: Steps before spikes are told, and about as many that the average remembers.
        skips_before_rollback: Steps left out in a row after which training goes back to a checkpoint.
        max_rollbacks: How often it does so in a run before it gives up.
        log_every: Steps between the counts' rows.
    """

    @checked
    def __init__(
        self,
        notes: Path,
        images: Callable[[int], Iterable[str]] = lambda batch: (),
        *,
        max_spike: Annotated[Number, Field(gt=1)] = 100.0,
        warmup_steps: Count = 100,
        skips_before_rollback: Count = 10,
        max_rollbacks: Annotated[Whole, Field(ge=0)] = 2,
        log_every: int = 50,
    ) -> None:
        self.notes, self.images, self.log_every = notes, images, log_every
        self.skips_before_rollback, self.max_rollbacks = skips_before_rollback, max_rollbacks
        self.running = RunningNorm(max_spike, warmup_steps)
        self.tallies: dict[str, Any] = {"skipped_steps": 0, "rollbacks": 0, "offset": 0, "went_to": None}
        self.streak, self.began = 0, 0
        self.skips = self._beside = torch.zeros((), dtype=torch.bool)
        """Whether the step that is being taken is left out, [] bool on its device."""
        self._norm, self._limit = torch.zeros(()), LARGEST
        self._losses: list[Tensor] = []
        self._unclipped: list[Tensor] = []
        self._carried: dict[str, Any] = {}
        self._average = 0.0
        self._pending: Numbers | None = None
        self._step = 0

    @property
    def offset(self) -> int:
        """Batches that roll-backs passed over."""
        return self.tallies["offset"]

    @property
    def skipped_steps(self) -> int:
        """Steps left out so far, those before a resume or a roll-back included."""
        return self.tallies["skipped_steps"] + self.skipped_last

    @property
    def skipped_last(self) -> bool:
        """Whether the last step was left out. A wait for the device, for those who are about to wait anyway."""
        return self._pending is not None and self._pending.bad

    def setup(self, trainer: Trainer, module: Any, stage: str) -> None:
        module.guard = self

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self._step = trainer.global_step
        clipped = {id(parameter) for parameter in module.trained.parameters()}
        self._unclipped = [p for p in parameters_of(trainer.optimizers[0]) if id(p) not in clipped]

    def watch(self, loss: Tensor) -> Tensor:
        """The loss of a batch, to be minimised. One that is not finite makes the gradient NaN, on all ranks."""
        value = loss.detach()
        self._losses.append(value)
        return loss * (1 + 0 * value)

    def judge(self, optimizer: Optimizer, norm: Tensor) -> None:
        """Leave the optimizer's step out where its gradient's norm says so: after backward, before the step."""
        for parameter in self._unclipped:  # a learned scale of the loss
            if parameter.grad is not None:
                norm = norm + 0 * parameter.grad.sum()
        self._norm, self._limit = norm.detach(), self.running.limit
        self.skips = self._beside = ~(self._norm <= self._limit)  # also where it is NaN
        leave_out(optimizer, self.skips)

    def judge_beside(self, optimizer: Optimizer) -> None:
        """The same for the step of a second optimizer, whose gradient must be finite and may spike."""
        norm = get_total_norm([p.grad for p in parameters_of(optimizer) if p.grad is not None])
        self._beside = self.skips | ~(norm <= LARGEST)
        leave_out(optimizer, self._beside)

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:
            return  # amid an accumulated step
        values = [value.float() for value in (self.skips, self._beside, self._norm, *self._losses)]
        before, self._pending = self._pending, Numbers.send(self._step, self._limit, torch.stack(values))
        self._losses.clear()
        self._step = trainer.global_step
        if before is not None:
            self._count(before)
        if trainer.global_step % self.log_every == 0 or (before is not None and before.bad):
            self._log(trainer, self.tallies["skipped_steps"])
        if self.streak >= self.skips_before_rollback:
            self._go_back(trainer)

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        if self._pending is not None and self.skipped_last:  # it is counted when training goes on
            self._note(self._pending)
            self._log(trainer, self.skipped_steps)

    def go_on_after(self, asked: RollBack, step: int) -> None:
        """Before a fit that goes on from a checkpoint of this step: what was counted stays so, the data goes on."""
        passed_over = asked.at - step
        self._carried = {
            **asked.tallies,
            "rollbacks": asked.tallies["rollbacks"] + 1,
            "offset": asked.tallies["offset"] + passed_over,
            "went_to": step,
        }
        self.tallies, self._average = dict(self._carried), asked.average
        self._write({"step": asked.began, "rolled_back_to": step, "batches_passed_over": passed_over})
        say(
            f"the steps from {asked.began} on went wrong: back to step {step}, and on with the batches after them "
            f"(roll-back {self.tallies['rollbacks']} of {self.max_rollbacks}; see {self.notes})",
            flush=True,
        )

    def _count(self, numbers: Numbers) -> None:
        """Take in a step's numbers, one step late; so are they in the limit, whether they waited or not."""
        _, _, norm, *_ = numbers.read()
        self.running.add(norm)
        if not numbers.bad:
            self.streak = 0
            return
        if self.streak == 0:
            self.began = numbers.step
        self.streak += 1
        self.tallies["skipped_steps"] += 1
        self._note(numbers)
        count = self.tallies["skipped_steps"]
        if math.log10(count).is_integer():  # the 1st, 10th, 100th
            say(f"step {numbers.step} was left out, {count} until now: {self.notes} says why", flush=True)

    def _note(self, numbers: Numbers) -> None:
        left_out, _, norm, *losses = numbers.read()
        why = "the discriminator's gradient is not finite"
        if left_out:
            why = "spike" if math.isfinite(norm) else "the gradient is not finite"
            why = why if all(map(math.isfinite, losses)) else "the loss is not finite"
        batch = numbers.step + self.offset
        self._write(
            {
                "step": numbers.step,
                "batch": batch,
                "why": why,
                "losses": [_plain(loss) for loss in losses],
                "gradient_norm": _plain(norm),
                "limit": numbers.limit if numbers.limit < LARGEST else None,
                "images": list(self.images(batch)),
            }
        )

    @rank_zero_only
    def _write(self, line: Mapping[str, Any]) -> None:
        """Add a line, unless it is there: steps that a resumed run takes again are noted once."""
        text = json.dumps(line)
        with forgiving(self.notes):
            known = self.notes.read_text(encoding="utf-8").splitlines() if self.notes.is_file() else []
            if text not in known:
                self.notes.parent.mkdir(parents=True, exist_ok=True)
                with self.notes.open("a", encoding="utf-8") as file:
                    file.write(text + "\n")

    def _log(self, trainer: Trainer, skipped_steps: int) -> None:
        """Straight to the loggers: what a module logs costs Lightning time at every step, written or not."""
        figures = {"train/skipped_steps": skipped_steps, "train/rollbacks": self.tallies["rollbacks"]}
        for logger in trainer.loggers:
            logger.log_metrics(figures, trainer.global_step - 1)

    def _go_back(self, trainer: Trainer) -> None:
        """Raises RollBack, or the UserError that says what to try."""
        if self.tallies["rollbacks"] < self.max_rollbacks:
            raise RollBack(self.began, trainer.global_step, self.tallies, self.running.mean)
        group, clip = trainer.optimizers[0].param_groups[0], trainer.gradient_clip_val
        raise UserError(
            f"Training diverged: the {self.streak} steps from {self.began} on had a loss or a gradient that is not "
            f"finite, or a gradient of more than {self.running.max_spike:g} times its average"
            + (f", also after {self.max_rollbacks} roll-backs to a checkpoint. " if self.max_rollbacks else ". ")
            + f"{self.notes} lists each with its numbers and its images: look at those. Else try a lower optimizer.lr "
            f"(it is {group.get('peak_lr', group['lr']):g}), a lower trainer.gradient_clip_val (it is {clip}) or "
            f"trainer.precision=32-true (it is {trainer.precision})."
        )

    def state_dict(self) -> dict[str, Any]:
        """The last step's numbers apart, so that they are counted when they would have been without a save."""
        pending = self._pending
        return {
            "running": [self.running.mean, self.running.count],
            "tallies": dict(self.tallies),
            "streak": [self.streak, self.began],
            "pending": pending and {"step": pending.step, "limit": pending.limit, "values": list(pending.read())},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        mean, self.running.count = state_dict["running"]
        self.running.mean = max(mean, self._average)  # norms that are high once more are no fault, but how they are
        self.streak, self.began = state_dict["streak"]
        self.tallies = {**state_dict["tallies"], **self._carried}
        self._pending = Numbers(**state_dict["pending"]) if state_dict["pending"] else None


def offset_of(checkpoint: Path | None) -> int:
    """Batches that roll-backs passed over before a checkpoint was saved."""
    if checkpoint is None:
        return 0
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    guard = saved["callbacks"].get("Guard")  # which alone knew it in older checkpoints
    return int(saved.get("step_offset", guard["tallies"]["offset"] if guard else 0))


def _plain(value: float) -> float | str:
    """A number as JSON knows it, or its name."""
    return value if math.isfinite(value) else str(value)
