"""One fit: a trainer with its callbacks and batches, made anew as often as training begins again."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from signal import Signals
from typing import Annotated, Any, TypedDict

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from pydantic import Field
from torch.utils.data import DataLoader

from ldm.data.loaders import train_loader, val_loader
from ldm.data.order import batch_at
from ldm.errors import UserError
from ldm.files.untrusted import first_line
from ldm.rules import Count, NonNegative, Positive, Switch, Whole, apply_rules
from ldm.runs.checkpoints import Manifest
from ldm.runtime import signals
from ldm.runtime.distributed import from_first
from ldm.training.callbacks.checkpoints import Checkpoints, StopTraining
from ldm.training.callbacks.guard import Guard, RollBack, offset_of
from ldm.training.callbacks.loggers import CsvLogger
from ldm.training.callbacks.progress import ProgressBar
from ldm.training.optim.budget import Budget, parse_duration
from ldm.training.optim.ema import EMACallback
from ldm.training.optim.precision import named_precision
from ldm.training.stages.base import Stage

FAULTS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError, MemoryError)
"""What constructors of others raise on arguments that they were not made for."""


class OwnOptions(TypedDict):
    """Of the config group `trainer`: what Lightning's Trainer does not take."""

    max_time: str | None
    ema_decay: float
    compile: Switch
    num_workers: Annotated[Whole, Field(ge=0, le=1024)]
    checkpoint_every_s: NonNegative
    keep_last: Count
    guard: dict[str, Any] | None


class TrainerOptions(OwnOptions):
    """Those, and what is not left to Lightning. A config names all of them."""

    max_steps: Annotated[Whole, Field(ge=-1)]
    precision: Any
    accelerator: str
    accumulate_grad_batches: Count
    log_every_n_steps: Count
    num_nodes: Count
    num_sanity_val_steps: Annotated[Whole, Field(ge=-1)]
    gradient_clip_val: NonNegative | None
    val_check_interval: Positive | None


def check_trainer(options: Mapping[str, Any]) -> None:
    """Refuse options of the config group `trainer` that no trainer and no guard can be made of.

    Raises:
        UserError: naming what is wrong.
    """
    if missing := [f"trainer.{key}" for key in TrainerOptions.__annotations__ if key not in options]:
        raise UserError(f"Training needs {', '.join(missing)}: leave what trainer= sets there, or give it a value.")
    apply_rules(TrainerOptions, options)
    if "fsdp" in str(options.get("strategy")).lower():
        raise UserError("trainer=fsdp does not work yet: use trainer=ddp, which keeps the whole network on every GPU.")
    if options["accelerator"] in ("gpu", "cuda") and not (
        torch.cuda.is_available() or torch.backends.mps.is_available()
    ):
        raise UserError("This trainer= needs a GPU, and torch finds none here. Choose trainer=cpu or trainer=auto.")
    guard_of(options, Path("skipped_steps.jsonl"))
    precision = named_precision(options["precision"])
    make_trainer(options, "32-true" if precision == "auto" else precision, logger=False, enable_checkpointing=False)


def make_trainer(options: Mapping[str, Any], precision: str, **others: Any) -> Trainer:
    """Lightning's Trainer, from the config group `trainer` and what we give it besides.

    Raises:
        UserError: it refuses the options.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    known = {key: value for key, value in options.items() if key not in ("_target_", *OwnOptions.__annotations__)}
    if type(every := known.get("val_check_interval")) is int:  # Lightning counts batches, and validates amid a step
        known["val_check_interval"] = every * options["accumulate_grad_batches"]
    try:
        return Trainer(**known | {"precision": precision}, **others, max_epochs=-1)  # steps and time are the budget
    except MisconfigurationException as error:
        raise UserError(f"{' '.join(str(error).split())} Choose trainer=cpu or trainer=auto.") from error
    except (*FAULTS, ImportError) as error:
        raise UserError(
            f"No trainer can be made of the options trainer.*: {first_line(error)}. Leave out what was given there, "
            "or choose trainer=cpu or trainer=auto."
        ) from error


def guard_of(options: Mapping[str, Any], notes: Path, *images: Callable[[int], Sequence[str]]) -> Guard | None:
    """The guard that the config group `trainer` asks for; None with trainer.guard=null.

    Raises:
        UserError: it is no such guard.
    """
    if (wanted := options["guard"]) in (None, False):
        return None
    known = ("max_spike", "warmup_steps", "skips_before_rollback", "max_rollbacks")
    if not isinstance(wanted, dict) or not wanted.keys() <= set(known):
        said = wanted if not isinstance(wanted, dict) else ", ".join(map(str, wanted))
        raise UserError(f"trainer.guard={str(said)[:80]} must be null, or hold none but: {', '.join(known)}.")
    return Guard(notes, *images, log_every=options["log_every_n_steps"], **wanted)


def make_budget(options: Mapping[str, Any], warmup_steps: int, decay: str) -> Budget:
    """The budget of a training, from the config group `trainer`.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    return Budget(options["max_steps"], parse_duration(options["max_time"]), warmup_steps, decay)


@dataclass(frozen=True)
class Plan:
    """What every fit of a run is made from.

    Args:
        options: The config group `trainer` as plain values.
        batch_size: Images per optimizer step, over all devices.
        val_images: At most this many validation images are looked at.
        again: The command that continues the run.
        on_saved: Called after every checkpoint that is saved.
    """

    stage: Stage
    folder: Path
    options: Mapping[str, Any]
    warmup_steps: int
    decay: str
    batch_size: int
    val_images: int
    seed: int
    precision: Any
    loggers: Sequence[Logger]
    again: str
    on_saved: Callable[[], None] = lambda: None

    @property
    def micro_batch(self) -> int:
        """Images per forward pass, over all devices."""
        return self.batch_size // self.options["accumulate_grad_batches"]


def make_guard(plan: Plan) -> Guard | None:
    """What watches over each step's numbers; None with trainer.guard=null."""
    images = plan.stage.images

    def names(batch: int) -> list[str]:
        positions = batch_at(batch, size=len(images.train_indices), batch_size=plan.batch_size, seed=plan.seed)
        return [images.names[images.train_indices[position]] for position in positions]

    return guard_of(plan.options, plan.folder / "skipped_steps.jsonl", names)


class Fit:
    """A trainer, its callbacks and its batches, to train once: from the beginning, or from a checkpoint.

    Raises:
        UserError: the trainer's options do not go together.
    """

    def __init__(self, plan: Plan, resumed: Manifest | None) -> None:
        self.plan, self.resumed = plan, resumed
        stage, options = plan.stage, plan.options
        self.budget = make_budget(options, plan.warmup_steps, plan.decay)
        self.step = 0
        if resumed is not None:
            self.step, self.budget.spent_s = resumed.step, resumed.trained_s
        self.ema = EMACallback(options["ema_decay"])
        self.bar = ProgressBar(self.budget, plan.batch_size, options["log_every_n_steps"], f"stage {stage.kind}")
        self.checkpoints = Checkpoints(
            plan.folder,
            self.budget,
            options["checkpoint_every_s"],
            keep_last=options["keep_last"],
            stage=stage.kind,
            resumed=resumed,
            on_saved=plan.on_saved,
        )
        self.guard, self.offset = make_guard(plan), offset_of(None if resumed is None else resumed.path)
        if (guard := self.guard) is not None:
            guard.tallies["offset"] = self.offset  # training may have gone on without a guard since
            self.checkpoints.withheld = lambda: guard.skipped_last
        stage.module.log_every, stage.module.progress = options["log_every_n_steps"], self.budget.progress
        self.trainer = make_trainer(
            options,
            plan.precision,
            # the guard first: what it knows of a step is asked for when the others decide what follows
            callbacks=[*([guard] if guard else []), self.budget, self.ema, self.bar, self.checkpoints],
            logger=list(plan.loggers),
            default_root_dir=plan.folder,
        )

    def log_to(self, loggers: Sequence[Logger]) -> None:
        """From here on metrics go to these."""
        self.plan = replace(self.plan, loggers=loggers)
        self.trainer.loggers = list(loggers)

    def to_the_end(self, make_stage: Callable[[], Stage]) -> "Fit":
        """Run this fit, and those that go on where it rolled back; the last of them. Nothing runs of a stage that
        takes its weights as they come.

        Raises:
            Interrupted: a signal asked to stop; what was reached is saved.
            UserError: training diverged.
        """
        fit = self
        while fit.plan.stage.trains:
            try:
                fit.run()
                break
            except RollBack as asked:
                fit = fit.after(asked, make_stage)
        return fit

    def after(self, asked: RollBack, make_stage: Callable[[], Stage]) -> "Fit":
        """The fit that goes on from a checkpoint from before the steps that went wrong, else from the beginning."""
        known = {found.step: found for found in reversed(self.checkpoints.branch()) if found.fault() is None}
        step, resumed = from_first(asked.choose(known))  # it alone knows what it saved
        fit = Fit(self.plan if resumed is not None else replace(self.plan, stage=make_stage()), resumed)
        assert fit.guard is not None
        fit.guard.go_on_after(asked, step)
        fit.offset, fit.budget.spent_s, fit.bar.speed = fit.guard.offset, self.budget.elapsed_s, self.bar.speed
        for logger in self.plan.loggers:
            if isinstance(logger, CsvLogger):
                logger.go_back(resumed.last_row if resumed is not None else -1)
        return fit

    def run(self) -> None:
        """Train to the end of the budget, and validate there once.

        Raises:
            Interrupted: a signal asked to stop; what was reached is saved.
            RollBack: too many steps in a row went wrong; `after` goes on from before them.
        """
        stage, trainer = self.plan.stage, self.trainer
        stage.module.step_offset = self.offset
        fit_batches, val_batches = self._batches()
        resumed = str(self.resumed.path) if self.resumed is not None else None
        with warnings.catch_warnings():
            # ours is an endless loader over memory-mapped arrays: workers and epochs do not apply to it
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*LeafSpec.*")
            if self.guard is None:  # the run may have had one before
                warnings.filterwarnings("ignore", ".*add the following callbacks: .'Guard'.*")
            try:
                trainer.fit(stage.module, fit_batches, val_batches, ckpt_path=resumed, weights_only=True)
                if self.ema.validated_at != trainer.global_step and not self._signal():
                    trainer.validate(stage.module, val_batches, verbose=False)
                number = self._signal()  # it came when all was trained
            except StopTraining as stopped:
                raise signals.Interrupted(stopped.signal, self._farewell(stopped.signal)) from None
            except SystemExit as ended:  # how Lightning passes on a KeyboardInterrupt, before the first step
                raise ended.__context__ if isinstance(ended.__context__, KeyboardInterrupt) else ended from None
            finally:
                signals.release()
        if number := number or signals.pending() or 0:
            raise signals.Interrupted(number, self._farewell(number))

    def _signal(self) -> int:
        """The signal that any rank was sent, 0 without one: all validate and end together, or none does."""
        return self.budget.agreement.decide(self.trainer)["signal"]

    def _farewell(self, number: int) -> str:
        name, last = Signals(number).name, self.checkpoints.saved or self.resumed
        kept = f"saved {last.path}" if last is not None else "nothing was trained"
        return f"stopped by {name} after step {self.trainer.global_step}; {kept}. To go on: {self.plan.again}"

    def _batches(self) -> tuple[DataLoader, DataLoader]:
        plan, images = self.plan, self.plan.stage.images
        fit_batches = train_loader(
            plan.stage.fetch,
            images.train_indices,
            batch_size=plan.batch_size,
            seed=plan.seed,
            start=self.step + self.offset,
            accumulate=plan.options["accumulate_grad_batches"],
            rank=self.trainer.global_rank,
            num_ranks=self.trainer.world_size,
            num_workers=plan.options["num_workers"],
        )
        held_out = images.val_indices[: plan.val_images]
        return fit_batches, val_loader(plan.stage.fetch, held_out, batch_size=plan.micro_batch)
