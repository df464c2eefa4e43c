"""Train one stage, or both: stage=all runs the two as commands of their own, after their options are checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ldm.cli.command_line import CommandLine
from ldm.cli.images import prepare_images
from ldm.cli.main import command_line, compose, construct, environment_of_children
from ldm.errors import UserError
from ldm.latents.contract import LatentContract
from ldm.runs.resume import default_name, place_of, read_resume
from ldm.runs.run import Run
from ldm.runtime import child, launcher, shell, signals
from ldm.runtime.distributed import is_main_process
from ldm.runtime.paths import STAGES, is_run
from ldm.training import checks, session

OWN = {
    "vae": ("autoencoder", "regulariser", "perceptual", "adversarial"),
    "diffusion": ("network", "schedule", "objective", "variance", "conditioning", "sampler"),
}
"""Options that only one of the stages has a use for."""
PREFIXES = {"vae": "stage1.", "diffusion": "stage2."}

_trained: dict[tuple[str, ...], Path] = {}
"""The autoencoders of this sweep's earlier jobs, by their options."""


def train(config: DictConfig) -> None:
    """Train the stage that `stage=` names.

    Raises:
        Interrupted: a signal asked to stop; with how to go on.
        UserError: bad input, before anything is changed.
    """
    command = command_line()
    if command.choices["stage"] == "all":
        TwoStages.plan(config, command).train()
        return
    if {"stage1", "stage2"} & set(config):
        raise UserError("The prefixes stage1. and stage2. go with stage=all: leave them out to train one stage.")
    session.train_stage(config)


@dataclass(frozen=True)
class TwoStages:
    """A training of both stages.

    Args:
        folders: The run folder of each stage.
        options: The options of each stage, as typed, but for name, place and what goes on.
        overwrite: By stage, whether a run that is there is replaced.
        typed: The options of this command, as typed, but for the same.
    """

    folders: Mapping[str, Path]
    options: Mapping[str, tuple[str, ...]]
    overwrite: Mapping[str, bool]
    resume: bool
    typed: tuple[str, ...]

    @classmethod
    def plan(cls, config: DictConfig, command: CommandLine) -> "TwoStages":
        """Check what can be checked of both stages before the first is trained: options, images and conditions.

        Raises:
            UserError: naming the option and the remedy.
        """
        resume, named = read_resume(config)
        if not isinstance(resume, bool):
            raise UserError(f"resume={resume} is a checkpoint of one stage: continue that with stage=vae|diffusion.")
        if config.vae is not None and command.choices["autoencoder"] != "pretrained":
            raise UserError(f"stage=all trains an autoencoder, and vae={config.vae} is one: choose stage=diffusion.")
        typed = command.options_to_continue(config)
        name = str(config.name) if named else default_name(command)
        planned = cls(
            folders={stage: Path(config.runs_dir).expanduser() / stage / name for stage in STAGES},
            options={stage: options_of(stage, typed) for stage in STAGES},
            overwrite={s: config.overwrite or config[PREFIXES[s][:-1]].get("overwrite", False) for s in STAGES},
            resume=resume or (named and launcher.is_restarted_by_slurm()),
            typed=tuple(typed),
        )
        for stage, folder in planned.folders.items():
            if is_main_process() and is_run(folder) and not (planned.resume or planned.overwrite[stage]):
                raise UserError(
                    f"{folder} exists already. Choose another name=, continue both stages with resume=true, or start "
                    "them anew with overwrite=true."
                )
        planned._check()
        return planned

    def _check(self) -> None:
        configs = {stage: compose([*self.options[stage], *place_of(self.folders[stage])]) for stage in STAGES}
        for config in configs.values():
            checks.check_options(config)
            checks.check_stage(config, construct(config.stage.build))
        images = prepare_images(configs["vae"].data)
        for config in configs.values():
            checks.check_batch(config, len(images.train_indices))
        construct(configs["diffusion"].conditioning.build)(images)

    def train(self) -> None:
        """Train what is not finished yet, each stage as a command of its own."""
        autoencoder = _trained.get(self.options["vae"])
        if autoencoder is None:
            autoencoder = self.folders["vae"]
            self._train("vae", self.options["vae"])
            _trained[self.options["vae"]] = autoencoder
        else:
            print(f"\nstage 1: the autoencoder of the same options in {autoencoder} is used again", flush=True)
        self._train("diffusion", (*self.options["diffusion"], f"vae={autoencoder}"), autoencoder)

    def _train(self, stage: str, options: tuple[str, ...], autoencoder: Path | None = None) -> None:
        folder, then = self.folders[stage], self._started(stage)
        resumes = self.resume and then is not None and not self.overwrite[stage]
        if resumes and is_finished(folder, autoencoder):
            print(f"\nstage={stage}: {folder} is finished and kept", flush=True)
            return
        modes = ["resume=true"] if resumes else ["overwrite=true"] if self.overwrite[stage] else []
        arguments = [*options, *place_of(folder), *modes]
        print(f"\n{shell.train_command(*arguments)}", flush=True)
        try:
            code = child.run_python(["-m", "ldm.train", *arguments], environment_of_children())
        except signals.Interrupted as stopped:
            said = f"{stopped} in stage={stage}. {self._to_go_on(stage, then)}"
            raise signals.Interrupted(stopped.signal, said) from None
        if code:
            raise UserError(f"stage={stage} ended for the reason given above. {self._to_go_on(stage, then)}")

    def _started(self, stage: str) -> float | None:
        """When the run in the folder of a stage began; None without one."""
        folder = self.folders[stage]
        return Run.open(folder).facts.get("started", 0.0) if is_run(folder) else None

    def _to_go_on(self, stage: str, then: float | None) -> str:
        """The command that goes on with both stages.

        Args:
            then: When the run began that was in the folder before: one that is still there was not replaced yet.
        """
        ends = ["resume=true"]
        if self.overwrite[stage] and self._started(stage) in (None, then):
            ends = ["overwrite=true"] if stage == "vae" else ["resume=true", "stage2.overwrite=true"]
        elif self.overwrite["diffusion"] and stage == "vae":
            ends.append("stage2.overwrite=true")
        typed = [option for option in self.typed if not option.startswith(("stage1.overwrite=", "stage2.overwrite="))]
        return f"To go on with both stages: {shell.train_command(*typed, *place_of(self.folders[stage]), *ends)}"


def options_of(stage: str, typed: list[str]) -> tuple[str, ...]:
    """Of the options of stage=all, those of one of its stages: what both have, then what is its alone."""
    (other,) = set(STAGES) - {stage}
    shared, own = [f"stage={stage}"], []
    for option in typed:
        bare = option.lstrip("+~")
        group = bare.partition("=")[0].partition(".")[0]
        if bare.startswith(PREFIXES[stage]):
            own.append(option.replace(PREFIXES[stage], "", 1))
        elif not bare.startswith(PREFIXES[other]) and group not in ("stage", *OWN[other]):
            shared.append(option)
    given = {option.partition("=")[0] for option in own}
    return (*(option for option in shared if option.partition("=")[0] not in given), *own)


def is_finished(folder: Path, autoencoder: Path | None) -> bool:
    """Whether the run in a folder has nothing left to train: finished, and on the latents of that autoencoder."""
    run = Run.open(folder)
    if not run.finished or autoencoder is None:
        return run.finished
    known: Any = run.facts.get("contract", {}).get("autoencoder_sha256")
    return known == LatentContract.load(autoencoder).autoencoder_sha256
