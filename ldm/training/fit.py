"""One fit: a trainer with its callbacks and batches, made anew as often as training begins again."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from signal import Signals
from typing import Annotated, Any, TypedDict

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from pydantic import Field
from torch.utils.data import DataLoader

from ldm.data.loaders import train_loader, val_loader
from ldm.data.order import batch_at
from ldm.errors import UserError
from ldm.files.untrusted import first_line
from ldm.rules import Count, NonNegative, Number, Positive, Switch, Whole, apply_rules
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
    ema_decay: Annotated[Number, Field(ge=0, lt=1)]
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
    except (*FAULTS, ImportError, MisconfigurationException) as error:
        raise UserError(
            f"No trainer can be made of the options trainer.*: {first_line(error)}. Choose trainer=cpu or "
            "trainer=auto, or leave out what was given there."
        ) from error


def guard_of(options: Mapping[str, Any], notes: Path, *images: Callable[[int], Sequence[str]]) -> Guard | None:
    """The guard that the config group `trainer` asks for; None with trainer.guard=null.

    Raises:
        UserError: it is no such guard.
    """
    if (wanted := options["guard"]) is None:
        return None
    known = ("max_spike", "warmup_steps", "skips_before_rollback", "max_rollbacks")
    if not isinstance(wanted, dict) or not wanted.keys() <= set(known):
        raise UserError(f"trainer.guard={str(wanted)[:80]} must be null, or hold none but: {', '.join(known)}.")
    return Guard(notes, *images, log_every=options["log_every_n_steps"], **wanted)


def make_budget(config: Mapping[str, Any]) -> Budget:
    """The budget of a training.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    steps, time_s = config["trainer"]["max_steps"], parse_duration(config["trainer"]["max_time"])
    return Budget(steps, time_s, config["optimizer"]["warmup_steps"], config["optimizer"]["decay"])


@dataclass(frozen=True)
class Plan:
    """What every fit of a run is made from.

    Args:
        config: Of the training, as plain values.
        on_saved: Called after every checkpoint that is saved.
    """

    stage: Stage
    folder: Path
    config: Mapping[str, Any]
    precision: Any
    on_saved: Callable[[], None]
    loggers: Sequence[Logger] = ()

    @property
    def micro_batch(self) -> int:
        """Images per forward pass, over all devices."""
        return self.config["batch_size"] // self.config["trainer"]["accumulate_grad_batches"]

    def names(self, batch: int) -> list[str]:
        """The images in a batch of the order."""
        images, config = self.stage.images, self.config
        positions = batch_at(
            batch, size=len(images.train_indices), batch_size=config["batch_size"], seed=config["seed"]
        )
        return [images.names[images.train_indices[position]] for position in positions]


class Fit:
    """A trainer, its callbacks and its batches, to train once: from the beginning, or from a checkpoint.

    Raises:
        UserError: the trainer's options do not go together.
    """

    def __init__(self, plan: Plan, resumed: Manifest | None) -> None:
        self.plan, self.resumed = plan, resumed
        stage, options = plan.stage, plan.config["trainer"]
        self.budget = make_budget(plan.config)
        self.step = 0
        if resumed is not None:
            self.step, self.budget.spent_s = resumed.step, resumed.trained_s
        self.ema = EMACallback(options["ema_decay"])
        self.bar = ProgressBar(
            self.budget, plan.config["batch_size"], options["log_every_n_steps"], f"stage {stage.kind}"
        )
        self.checkpoints = Checkpoints(
            plan.folder,
            self.budget,
            options["checkpoint_every_s"],
            keep_last=options["keep_last"],
            stage=stage.kind,
            resumed=resumed,
            on_saved=plan.on_saved,
        )
        self.guard = guard_of(options, plan.folder / "skipped_steps.jsonl", plan.names)
        stage.module.step_offset = offset_of(None if resumed is None else resumed.path)
        if (guard := self.guard) is not None:
            guard.tallies["offset"] = stage.module.step_offset  # training may have gone on without a guard since
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
        fit.plan.stage.module.step_offset = fit.guard.offset
        fit.budget.spent_s, fit.bar.speed = self.budget.elapsed_s, self.bar.speed
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
        fit_batches, val_batches = self._batches()
        resumed = str(self.resumed.path) if self.resumed is not None else None
        with warnings.catch_warnings():
            # ours is an endless loader over memory-mapped arrays: workers and epochs do not apply to it
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*LeafSpec.*")
            warnings.filterwarnings("ignore", ".*add the following callbacks: .'Guard'.*")  # now trainer.guard=null
            try:
                trainer.fit(stage.module, fit_batches, val_batches, ckpt_path=resumed, weights_only=True)
                if self.ema.validated_at != trainer.global_step and not self._signal():
                    trainer.validate(stage.module, val_batches, verbose=False)
                number = self._signal()  # it came when all was trained
            except StopTraining as stopped:
                number = stopped.signal
            except SystemExit as ended:  # how Lightning passes on a KeyboardInterrupt, before the first step
                raise ended.__context__ if isinstance(ended.__context__, KeyboardInterrupt) else ended from None
            finally:
                signals.release()
        if number := number or signals.pending() or 0:
            last, step = self.checkpoints.saved or self.resumed, self.trainer.global_step
            kept = f"saved {last.path}" if last is not None else "nothing was trained"
            said = f"stopped by {Signals(number).name} after step {step}; {kept}"
            raise signals.Interrupted(number, said)

    def _signal(self) -> int:
        """The signal that any rank was sent, 0 without one: all validate and end together, or none does."""
        return self.budget.agreement.decide(self.trainer)["signal"]

    def _batches(self) -> tuple[DataLoader, DataLoader]:
        plan, config, images = self.plan, self.plan.config, self.plan.stage.images
        fit_batches = train_loader(
            plan.stage.fetch,
            images.train_indices,
            batch_size=config["batch_size"],
            seed=config["seed"],
            start=self.step + plan.stage.module.step_offset,
            accumulate=config["trainer"]["accumulate_grad_batches"],
            rank=self.trainer.global_rank,
            num_ranks=self.trainer.world_size,
            num_workers=config["trainer"]["num_workers"],
        )
        held_out = images.val_indices[: config["val_images"]]
        return fit_batches, val_loader(plan.stage.fetch, held_out, batch_size=plan.micro_batch)
