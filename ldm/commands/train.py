"""Train one or both stages. stage=all checks the options of both stages, then runs each in a separate process."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ldm.cli.command_line import CommandLine
from ldm.cli.images import prepare_images
from ldm.cli.main import child_environment, command_line, compose, construct
from ldm.errors import UserError
from ldm.latents.contract import LatentContract
from ldm.runs.resume import default_name, folder_options, read_resume
from ldm.runs.run import Run
from ldm.runtime import child, launcher, shell, signals
from ldm.runtime.distributed import is_main_process
from ldm.runtime.paths import STAGES, is_run
from ldm.training import checks, session

STAGE_OPTIONS = {
    "vae": ("autoencoder", "regulariser", "perceptual", "adversarial"),
    "diffusion": ("network", "schedule", "objective", "variance", "conditioning", "sampler"),
}
"""Options that apply to only one of the stages."""
PREFIXES = {"vae": "stage1.", "diffusion": "stage2."}

_trained_autoencoders: dict[tuple[str, ...], Path] = {}
"""Run folders of the autoencoders trained by earlier jobs of this multirun, keyed by training options."""


def train(config: DictConfig) -> None:
    """Train the stage given by `stage=`, or both.

    Raises:
        Interrupted: if a signal arrived. The message contains the command that resumes training.
        UserError: if the input is invalid. Nothing on disk has been changed.
    """
    command = command_line()
    if command.choices["stage"] == "all":
        TwoStages.plan(config, command).train()
        return
    if {"stage1", "stage2"} & set(config):
        raise UserError("The prefixes stage1. and stage2. are only for stage=all. Remove them to train a single stage.")
    session.train_stage(config)


@dataclass(frozen=True)
class TwoStages:
    """Training of both stages, one after the other.

    Args:
        folders: Run folder of each stage.
        options: Options for each stage, as typed, except name=, runs_dir=, resume= and overwrite=.
        overwrite: For each stage, True to replace an existing run.
        resume: True to resume existing runs.
        cli_options: Options of this command, as typed, except the same four.
    """

    folders: Mapping[str, Path]
    options: Mapping[str, tuple[str, ...]]
    overwrite: Mapping[str, bool]
    resume: bool
    cli_options: tuple[str, ...]

    @classmethod
    def plan(cls, config: DictConfig, command: CommandLine) -> "TwoStages":
        """Plan both runs, and check their options, images and conditions before the first run starts.

        Raises:
            UserError: if a check fails.
        """
        resume, has_name = read_resume(config)
        if not isinstance(resume, bool):
            raise UserError(
                f"resume={resume} is a checkpoint of a single stage. Resume it with stage=vae or stage=diffusion."
            )
        if config.vae is not None and command.choices["autoencoder"] != "pretrained":
            raise UserError(
                f"vae={config.vae} is an existing autoencoder, but stage=all trains a new one. Use stage=diffusion."
            )
        options = command.options_to_resume(config)
        name = str(config.name) if has_name else default_name(command)
        plan = cls(
            folders={stage: Path(config.runs_dir).expanduser() / stage / name for stage in STAGES},
            options={stage: select_stage_options(stage, options) for stage in STAGES},
            overwrite={s: config.overwrite or config[PREFIXES[s][:-1]].get("overwrite", False) for s in STAGES},
            resume=resume or (has_name and launcher.is_restarted_by_slurm()),
            cli_options=tuple(options),
        )
        for stage, folder in plan.folders.items():
            if is_main_process() and is_run(folder) and not (plan.resume or plan.overwrite[stage]):
                raise UserError(
                    f"{folder} already exists. Choose a new name=, resume both stages with resume=true, or replace "
                    "them with overwrite=true."
                )
        plan._check()
        return plan

    def _check(self) -> None:
        configs = {stage: compose([*self.options[stage], *folder_options(self.folders[stage])]) for stage in STAGES}
        for config in configs.values():
            checks.check_options(config)
            checks.check_stage(config, construct(config.stage.build))
        images = prepare_images(configs["vae"].data)
        for config in configs.values():
            checks.check_batch(config, len(images.train_indices))
        construct(configs["diffusion"].conditioning.build)(images)

    def train(self) -> None:
        """Train each unfinished stage in a separate process."""
        autoencoder = _trained_autoencoders.get(self.options["vae"])
        if autoencoder is None:
            autoencoder = self.folders["vae"]
            self._train("vae", self.options["vae"])
            _trained_autoencoders[self.options["vae"]] = autoencoder
        else:
            print(f"\nstage=vae: reusing {autoencoder}, which was trained with the same options", flush=True)
        self._train("diffusion", (*self.options["diffusion"], f"vae={autoencoder}"), autoencoder)

    def _train(self, stage: str, options: tuple[str, ...], autoencoder: Path | None = None) -> None:
        folder, previous_start = self.folders[stage], self._start_time(stage)
        should_resume = self.resume and previous_start is not None and not self.overwrite[stage]
        if should_resume and is_finished(folder, autoencoder):
            print(f"\nstage={stage}: {folder} is already finished", flush=True)
            return
        mode = ["resume=true"] if should_resume else ["overwrite=true"] if self.overwrite[stage] else []
        arguments = [*options, *folder_options(folder), *mode]
        print(f"\n{shell.train_command(*arguments)}", flush=True)
        try:
            exit_code = child.run_python(["-m", "ldm.train", *arguments], child_environment())
        except signals.Interrupted as interrupted:
            message = f"{interrupted} in stage={stage}. {self._continue_hint(stage, previous_start)}"
            raise signals.Interrupted(interrupted.signal, message) from None
        if exit_code:
            raise UserError(f"stage={stage} failed; see the error above. {self._continue_hint(stage, previous_start)}")

    def _start_time(self, stage: str) -> float | None:
        """Return the start time of the run in a stage's folder, or None if it contains no run."""
        folder = self.folders[stage]
        return Run.open(folder).facts.get("started", 0.0) if is_run(folder) else None

    def _continue_hint(self, stage: str, previous_start: float | None) -> str:
        """Return a sentence with the command that continues both stages.

        Args:
            previous_start: Start time of the run that was in the stage's folder before training. If the folder still
                contains a run with this start time, that run has not been replaced yet.
        """
        mode = ["resume=true"]
        if self.overwrite[stage] and self._start_time(stage) in (None, previous_start):
            mode = ["overwrite=true"] if stage == "vae" else ["resume=true", "stage2.overwrite=true"]
        elif self.overwrite["diffusion"] and stage == "vae":
            mode.append("stage2.overwrite=true")
        overwrites = ("stage1.overwrite=", "stage2.overwrite=")
        options = [option for option in self.cli_options if not option.startswith(overwrites)]
        return f"To continue both stages: {shell.train_command(*options, *folder_options(self.folders[stage]), *mode)}"


def select_stage_options(stage: str, options: list[str]) -> tuple[str, ...]:
    """Return one stage's options from a stage=all command: shared ones, then stage-specific ones without prefix."""
    (other_stage,) = set(STAGES) - {stage}
    shared, specific = [f"stage={stage}"], []
    for option in options:
        assignment = option.lstrip("+~")
        group = assignment.partition("=")[0].partition(".")[0]
        if assignment.startswith(PREFIXES[stage]):
            specific.append(option.replace(PREFIXES[stage], "", 1))
        elif not assignment.startswith(PREFIXES[other_stage]) and group not in ("stage", *STAGE_OPTIONS[other_stage]):
            shared.append(option)
    overridden_keys = {option.partition("=")[0] for option in specific}
    return (*(option for option in shared if option.partition("=")[0] not in overridden_keys), *specific)


def is_finished(folder: Path, autoencoder: Path | None) -> bool:
    """Return True if the run in a folder is finished and, for stage=diffusion, was trained on this autoencoder."""
    run = Run.open(folder)
    if not run.finished or autoencoder is None:
        return run.finished
    sha256: Any = run.facts.get("contract", {}).get("autoencoder_sha256")
    return sha256 == LatentContract.load(autoencoder).autoencoder_sha256
