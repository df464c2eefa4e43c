"""A fit is a trainer with its callbacks and data loaders. After each rollback, a run continues with a new fit."""

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
from ldm.rules import Count, Flag, Integer, NonNegative, Number, Positive, apply_rules
from ldm.runs.checkpoints import Manifest
from ldm.runtime import signals
from ldm.runtime.distributed import broadcast_from_rank_0
from ldm.training.callbacks.checkpoints import Checkpoints, StopTraining
from ldm.training.callbacks.guard import Guard, RollBack, load_step_offset
from ldm.training.callbacks.loggers import CsvLogger
from ldm.training.callbacks.progress import ProgressBar
from ldm.training.optim.budget import Budget, parse_duration
from ldm.training.optim.ema import EMACallback
from ldm.training.optim.precision import normalise_precision
from ldm.training.stages.base import Stage

CONSTRUCTOR_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError, MemoryError)
"""Exceptions that third-party constructors raise on invalid arguments."""


class ExtraTrainerOptions(TypedDict):
    """Keys of the config group `trainer` that are not arguments of Lightning's Trainer."""

    max_time: str | None
    ema_decay: Annotated[Number, Field(ge=0, lt=1)]
    compile: Flag
    num_workers: Annotated[Integer, Field(ge=0, le=1024)]
    checkpoint_every_s: NonNegative
    keep_last: Count
    guard: dict[str, Any] | None


class TrainerOptions(ExtraTrainerOptions):
    """Rules for the required keys of the config group `trainer`."""

    max_steps: Annotated[Integer, Field(ge=-1)]
    precision: Any
    accelerator: str
    accumulate_grad_batches: Count
    log_every_n_steps: Count
    num_nodes: Count
    num_sanity_val_steps: Annotated[Integer, Field(ge=-1)]
    gradient_clip_val: NonNegative | None
    val_check_interval: Positive | None


def check_trainer(options: Mapping[str, Any]) -> None:
    """Check that the config group `trainer` defines a valid trainer and guard.

    Raises:
        UserError: An option is missing or invalid.
    """
    if missing := [f"trainer.{key}" for key in TrainerOptions.__annotations__ if key not in options]:
        raise UserError(
            f"Training needs {', '.join(missing)}. Set a value for each, or use the default trainer config."
        )
    apply_rules(TrainerOptions, options)
    if "fsdp" in str(options.get("strategy")).lower():
        raise UserError("trainer=fsdp is not supported yet. Use trainer=ddp, which keeps the full network on each GPU.")
    make_guard(options, Path("skipped_steps.jsonl"))
    precision = normalise_precision(options["precision"])
    make_trainer(options, "32-true" if precision == "auto" else precision, logger=False, enable_checkpointing=False)


def make_trainer(options: Mapping[str, Any], precision: str, **arguments: Any) -> Trainer:
    """Build Lightning's Trainer from the config group `trainer` and further arguments.

    Raises:
        UserError: Lightning rejects the options.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    extra = ("_target_", *ExtraTrainerOptions.__annotations__)
    kwargs = {key: value for key, value in options.items() if key not in extra}
    if type(interval := kwargs.get("val_check_interval")) is int:  # a number of steps; Lightning counts micro-batches
        kwargs["val_check_interval"] = interval * options["accumulate_grad_batches"]
    try:
        return Trainer(**kwargs | {"precision": precision}, **arguments, max_epochs=-1)  # the budget ends training
    except (*CONSTRUCTOR_ERRORS, ImportError, MisconfigurationException) as error:
        raise UserError(
            f"Lightning rejected the trainer.* options: {first_line(error)}. Choose trainer=cpu or trainer=auto, or "
            "remove your trainer.* options."
        ) from error


def make_guard(
    options: Mapping[str, Any], skip_log: Path, *image_names: Callable[[int], Sequence[str]]
) -> Guard | None:
    """Build the guard from the config group `trainer`, or return None if trainer.guard=null.

    Raises:
        UserError: trainer.guard has an unknown key or is not a mapping.
    """
    if (guard := options["guard"]) is None:
        return None
    keys = ("max_spike", "warmup_steps", "skips_before_rollback", "max_rollbacks")
    if not isinstance(guard, dict) or not guard.keys() <= set(keys):
        raise UserError(f"trainer.guard={str(guard)[:80]} must be null or a mapping. Valid keys: {', '.join(keys)}.")
    return Guard(skip_log, *image_names, log_every=options["log_every_n_steps"], **guard)


def make_budget(config: Mapping[str, Any], second_phase_at: float = 1.0) -> Budget:
    """Build the training budget from the config.

    Raises:
        UserError: The budget is missing or cannot be parsed.
    """
    steps, time_s = config["trainer"]["max_steps"], parse_duration(config["trainer"]["max_time"])
    return Budget(steps, time_s, config["optimizer"]["warmup_steps"], config["optimizer"]["decay"], second_phase_at)


@dataclass(frozen=True)
class FitSpec:
    """Settings shared by all fits of a run.

    Args:
        config: The training config, as plain values.
        on_saved: Called after each checkpoint has been saved.
    """

    stage: Stage
    folder: Path
    config: Mapping[str, Any]
    precision: Any
    on_saved: Callable[[], None]
    loggers: Sequence[Logger] = ()

    @property
    def micro_batch_size(self) -> int:
        """Images per forward pass, summed over all devices."""
        return self.config["batch_size"] // self.config["trainer"]["accumulate_grad_batches"]

    def image_names(self, batch: int) -> list[str]:
        """Return the file names of the images in the batch with this index in the data order."""
        images, config = self.stage.images, self.config
        positions = batch_at(
            batch, size=len(images.train_indices), batch_size=config["batch_size"], seed=config["seed"]
        )
        return [images.names[images.train_indices[position]] for position in positions]


class Fit:
    """A trainer with its callbacks and data loaders, starting from scratch or from a checkpoint.

    Raises:
        UserError: The trainer's options are not compatible.
    """

    def __init__(self, spec: FitSpec, resume_from: Manifest | None) -> None:
        self.spec, self.resume_from = spec, resume_from
        stage, options = spec.stage, spec.config["trainer"]
        self.budget = make_budget(spec.config, stage.module.second_phase_at)
        self.step = 0
        if resume_from is not None:
            self.step, self.budget.spent_s = resume_from.step, resume_from.trained_s
        self.ema = EMACallback(options["ema_decay"])
        self.progress_bar = ProgressBar(
            self.budget, spec.config["batch_size"], options["log_every_n_steps"], f"stage {stage.kind}"
        )
        self.checkpoints = Checkpoints(
            spec.folder,
            self.budget,
            options["checkpoint_every_s"],
            keep_last=options["keep_last"],
            stage=stage.kind,
            resume_from=resume_from,
            on_saved=spec.on_saved,
        )
        self.guard = make_guard(options, spec.folder / "skipped_steps.jsonl", spec.image_names)
        stage.module.step_offset = load_step_offset(None if resume_from is None else resume_from.path)
        if (guard := self.guard) is not None:
            guard.tallies["offset"] = stage.module.step_offset  # the checkpoint may have been saved without a guard
            self.checkpoints.is_unsafe_for_rollback = lambda: guard.skipped_last_step
        stage.module.log_every, stage.module.progress = options["log_every_n_steps"], self.budget.progress
        self.trainer = make_trainer(
            options,
            spec.precision,
            # The guard comes first because the other callbacks use its result for the current step.
            callbacks=[*([guard] if guard else []), self.budget, self.ema, self.progress_bar, self.checkpoints],
            logger=list(spec.loggers),
            default_root_dir=spec.folder,
        )

    def set_loggers(self, loggers: Sequence[Logger]) -> None:
        """Set the loggers of this fit and of later fits."""
        self.spec = replace(self.spec, loggers=loggers)
        self.trainer.loggers = list(loggers)

    def run_to_completion(self, make_stage: Callable[[], Stage]) -> "Fit":
        """Run this fit and, after each rollback, a new fit. Return the last fit.

        If the stage has nothing to train, return this fit immediately.

        Raises:
            Interrupted: A signal requested a stop. The current state is saved.
            UserError: Training diverged.
        """
        fit = self
        while fit.spec.stage.trains:
            try:
                fit.run()
                break
            except RollBack as rollback:
                fit = fit.restart(rollback, make_stage)
        return fit

    def restart(self, rollback: RollBack, make_stage: Callable[[], Stage]) -> "Fit":
        """Return a fit that restarts from a checkpoint before the bad steps, or from scratch if none exists."""
        checkpoints = {m.step: m for m in reversed(self.checkpoints.lineage()) if m.find_damage() is None}
        # Only rank 0 knows which checkpoints exist, so it chooses one for all ranks.
        step, resume_from = broadcast_from_rank_0(rollback.choose_checkpoint(checkpoints))
        fit = Fit(self.spec if resume_from is not None else replace(self.spec, stage=make_stage()), resume_from)
        assert fit.guard is not None
        fit.guard.resume_after(rollback, step)
        fit.spec.stage.module.step_offset = fit.guard.offset
        fit.budget.spent_s, fit.progress_bar.speed = self.budget.elapsed_s, self.progress_bar.speed
        for logger in self.spec.loggers:
            if isinstance(logger, CsvLogger):
                logger.drop_rows_after(resume_from.last_row if resume_from is not None else -1)
        return fit

    def run(self) -> None:
        """Train until the budget is spent, then validate the final weights.

        Raises:
            Interrupted: A signal requested a stop. The current state is saved.
            RollBack: Too many consecutive steps were skipped. `restart` builds the next fit.
        """
        stage, trainer = self.spec.stage, self.trainer
        train_batches, val_batches = self._make_loaders()
        ckpt_path = str(self.resume_from.path) if self.resume_from is not None else None
        with warnings.catch_warnings():
            # Our loader is infinite and reads memory-mapped arrays, so warnings about workers and epochs do not apply.
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*LeafSpec.*")
            # Lightning warns if a checkpoint saved with a guard is resumed with trainer.guard=null.
            warnings.filterwarnings("ignore", ".*add the following callbacks: .'Guard'.*")
            try:
                trainer.fit(stage.module, train_batches, val_batches, ckpt_path=ckpt_path, weights_only=True)
                if self.ema.last_validation_step != trainer.global_step and not self._received_signal():
                    trainer.validate(stage.module, val_batches, verbose=False)
                signal = self._received_signal()  # a signal can arrive after the last training step
            except StopTraining as stop:
                signal = stop.signal
            except SystemExit as error:  # Lightning converts a KeyboardInterrupt before the first step
                raise error.__context__ if isinstance(error.__context__, KeyboardInterrupt) else error from None
            finally:
                signals.stop_deferring()
        if signal := signal or signals.pending() or 0:
            checkpoint, step = self.checkpoints.last_saved or self.resume_from, self.trainer.global_step
            outcome = f"saved {checkpoint.path}" if checkpoint is not None else "nothing was trained"
            message = f"stopped by {Signals(signal).name} after step {step}; {outcome}"
            raise signals.Interrupted(signal, message)

    def _received_signal(self) -> int:
        """Return the signal received by any rank, or 0. All ranks get the same value, so they stop together."""
        return self.budget.agreement.update(self.trainer)["signal"]

    def _make_loaders(self) -> tuple[DataLoader, DataLoader]:
        spec, config, images = self.spec, self.spec.config, self.spec.stage.images
        train_batches = train_loader(
            spec.stage.fetch,
            images.train_indices,
            batch_size=config["batch_size"],
            seed=config["seed"],
            start=self.step + spec.stage.module.step_offset,
            accumulate=config["trainer"]["accumulate_grad_batches"],
            rank=self.trainer.global_rank,
            num_ranks=self.trainer.world_size,
            num_workers=config["trainer"]["num_workers"],
        )
        held_out = images.val_indices[: config["val_images"]]
        return train_batches, val_loader(spec.stage.fetch, held_out, batch_size=spec.micro_batch_size)
