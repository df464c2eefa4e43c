"""What a training goes on from: run, checkpoint and command, and whether it is still the same training."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ldm.cli.command_line import CommandLine, is_in
from ldm.errors import UserError
from ldm.files.untrusted import is_plain_name, one_line
from ldm.runs.checkpoints import FOLDER, Manifest, find_checkpoint, manifests, run_of
from ldm.runs.replacement import recover
from ldm.runs.run import Run
from ldm.runtime import launcher, shell
from ldm.runtime.paths import is_run
from ldm.tracking.artifact import flatten

SHARED = (
    *("seed", "batch_size", "latent_statistics", "init_from", "optimizer"),
    *("data.resolution", "data.resize", "data.flip", "data.val_fraction"),
)
DECIDES = {
    "vae": (*SHARED, "autoencoder", "regulariser", "perceptual", "adversarial"),
    "diffusion": (
        *(*SHARED, "network", "schedule", "objective", "variance", "conditioning"),
        *("data.caption_column", "data.label_column"),
    ),
}
"""Of the config of each stage: what decides weights, order and noise. Which images they are, their fingerprint says."""
MAY_CHANGE = (
    *("optimizer.lr", "optimizer.build.lr", "optimizer.warmup_steps", "optimizer.decay"),
    *("conditioning.guidance", "conditioning.prompts"),
)
SHOWN = (*MAY_CHANGE, "trainer.max_steps", "trainer.max_time", "trainer.gradient_clip_val", "trainer.ema_decay")
"""What a user may change on purpose, and is told of."""


@dataclass(frozen=True)
class Continuation:
    """Every answer about what went before: first from what was typed, and once the folder is locked, from the disk.

    Args:
        folder: Of the run.
        stage: Of the run.
        resume: What resume= comes to: False, True for the newest whole checkpoint, or the file of one.
        overwrite: The run that is there is replaced.
        named: The user chose the run's name.
        options: Those that the run is started with, as typed, but for its name and place.
        checkpoint: Where training goes on from; None to begin.
        known: Facts of the run that the checkpoint lies in.
        changed: Options that are others than that run's, and are worth a word, as "optimizer.lr 0.001 -> 0.0005".
    """

    folder: Path
    stage: str
    resume: bool | Path
    overwrite: bool
    named: bool
    options: tuple[str, ...]
    checkpoint: Manifest | None = None
    known: Mapping[str, Any] = field(default_factory=dict)
    changed: tuple[str, ...] = ()

    @classmethod
    def plan(cls, config: DictConfig, command: CommandLine, *, main_process: bool) -> "Continuation":
        """runs_dir/<stage>/<name>, and what is asked for there.

        Without a name, resume=<checkpoint> goes on in the run that it lies in; with another name it begins a run
        there. A job that SLURM started again goes on from what it saved itself, whatever it was begun from.

        Raises:
            UserError: the folder is in use by another run and neither resume nor overwrite was asked for.
        """
        resume, named = read_resume(config)
        stage = command.choices["stage"]
        name = launcher.share_run_name(str(config.name) if named else default_name(command), main_process=main_process)
        if not is_plain_name(name) or len(name.encode()) > 200:
            raise UserError(f"name={name} must be a plain folder name. Choose another place with runs_dir=.")
        planned = cls(
            folder=Path(config.runs_dir).expanduser() / stage / name,
            stage=stage,
            resume=resume if isinstance(resume, bool) else Path(str(resume)).expanduser(),
            overwrite=config.overwrite,
            named=named,
            options=tuple(command.options_to_continue(config)),
        )
        if main_process:
            recover(planned.folder, resume=resume is True and not config.overwrite)
        planned, continues = planned._settled()
        if main_process and is_run(planned.folder) and not (continues or config.overwrite):
            each = " With -m, each job needs a name of its own: 'name=NAME-${hydra:job.num}', or no name=."
            raise UserError(
                f"{planned.folder} exists already. Choose another name=, continue it with resume=true, or start it "
                f"anew with overwrite=true.{each if command.job is not None else ''}"
            )
        return planned

    def _settled(self) -> tuple["Continuation", bool]:
        """With the run that resume=<file> means and what SLURM makes of it; whether a run that is there goes on."""
        restarted = launcher.is_restarted_by_slurm()
        if restarted and self.named and not self.resume and is_run(self.folder):
            job = Run.open(self.folder).facts.get("slurm_job")
            if not self.overwrite or job == launcher.slurm_job():  # it does not overwrite what it began itself
                return replace(self, resume=True), True
        if isinstance(self.resume, bool):
            return self, self.resume
        place = self.folder if self.named else self.resume.parent.parent
        saved = has_saved_since(place, self.resume)
        if restarted and saved:
            return replace(self, folder=place, resume=True), True
        source = run_of(self.resume)
        if not self.named:
            return replace(self, folder=source), True
        # a run that was stopped before it saved anything begins at the file once more
        return self, source.resolve() == self.folder.resolve() or saved is False

    def find(self, now: Mapping[str, Any]) -> "Continuation":
        """The same with its checkpoint, which nobody else replaces while the folder is locked.

        Args:
            now: The config in force, as plain values.

        Raises:
            UserError: there is no whole checkpoint, or the options given now would lead to other weights.
        """
        checkpoint = find_checkpoint(self.folder, self.resume, stage=self.stage)
        if checkpoint is None:
            return self
        run = Run.open(replace(self, checkpoint=checkpoint).source, "resume")
        place = [*place_of(self.folder), f"resume={'true' if self.resume is True else self.resume}"]
        changed = refuse_other_options(run, now, place)
        return replace(self, checkpoint=checkpoint, known=run.facts, changed=tuple(changed))

    @property
    def source(self) -> Path:
        """The folder of the run that is continued."""
        return self.folder if self.checkpoint is None else self.checkpoint.path.parent.parent

    @property
    def is_same_run(self) -> bool:
        """Whether the run in the folder itself goes on, whose record is there."""
        return self.checkpoint is not None and self.source.resolve() == self.folder.resolve()

    @property
    def branch(self) -> dict[str, Any] | None:
        """What the run notes of the file that it went on from, and of the newest checkpoint that its folder held."""
        if isinstance(self.resume, bool):
            return self.known.get("branch")
        newest = max((found.sequence for found in manifests(self.folder / FOLDER)), default=-1)
        return {"file": str(self.resume.resolve()), "after": newest}

    def after_stop(self, said: str, *, has_replaced: bool) -> str:
        """What a signal that ended the training comes to in words, with the command that goes on.

        Args:
            has_replaced: overwrite=true has deleted the earlier run, so that resume=true no longer means that.
        """
        end = "resume=true"
        if not isinstance(self.resume, bool) and not has_saved_since(self.folder, self.resume):
            end = f"resume={self.resume}"
        elif self.overwrite and not has_replaced:
            end = "overwrite=true"
        return f"{said}. To go on: {shell.train_command(*self.options, *place_of(self.folder), end)}"

    def requeue(self) -> str:
        """Ask SLURM for the job to be started again, where it would find its run; in words what came of it."""
        if self.named or not isinstance(self.resume, bool) or not launcher.slurm_job():
            return launcher.requeue()
        return ". SLURM is not asked to start the job again: without name= it would begin another run each time"

    def check_facts(self, facts: Mapping[str, Any]) -> None:
        """Refuse to continue a run on other images, or on another autoencoder's latents: options alone do not tell.

        Raises:
            UserError: naming both.
        """
        for key, digest in (
            ("data", lambda content: content.get("data_fingerprint")),
            ("vae", lambda content: content.get("contract", {}).get("autoencoder_sha256")),
        ):
            then, now = digest(self.known), digest(facts)
            if then is not None and then != now:
                raise UserError(
                    f"resume= continues a run on {str(then)[:12]} in {key}={self.known.get(key)}, but "
                    f"{key}={facts.get(key)} holds {str(now)[:12]}. Name what it was started with, which is in its "
                    "config.yaml, or begin another run with another name=."
                )


def read_resume(config: DictConfig) -> tuple[bool | str, bool]:
    """What resume= comes to, a file or whether to continue, and whether the run is named.

    Raises:
        UserError: resume=true without a name.
    """
    resume, named = {None: False, "true": True}.get(config.resume, config.resume), config.name not in (None, "")
    if resume is True and not named:
        raise UserError("resume=true continues the run that name= gives: add name=NAME, its folder in runs/<stage>/.")
    return resume, named


def default_name(command: CommandLine) -> str:
    """Data, model and time, with the number of the job in a multirun: jobs may start in the same second."""
    part = command.choices["autoencoder" if command.choices["stage"] == "vae" else "network"]
    name = f"{command.choices['data']}-{part}-{time.strftime('%Y%m%d-%H%M%S')}"
    return name if command.job is None else f"{name}-{command.job}"


def place_of(folder: Path) -> list[str]:
    """The options that name a run folder."""
    runs = str(folder.parent.parent)
    return [*([] if runs == "runs" else [f"runs_dir={runs}"]), f"name={folder.name}"]


def has_saved_since(folder: Path, file: Path) -> bool | None:
    """Whether the run in `folder` went on from that file, and has saved since; None where it never went on from it."""
    branch = (Run.open(folder).facts.get("branch") or {}) if is_run(folder) else {}
    if branch.get("file") != str(file.expanduser().resolve()):
        return None
    return any(found.sequence > branch["after"] for found in manifests(folder / FOLDER))


def refuse_other_options(run: Run, now: Mapping[str, Any], place: Sequence[str]) -> list[str]:
    """Refuse options under which other weights would come out of a continued run.

    Args:
        now: The config of this moment, as plain values.
        place: The options that name the run and how it goes on.

    Returns:
        What else changed and is worth a word, as "optimizer.lr 0.001 -> 0.0005".

    Raises:
        UserError: naming what differs, and the command that goes on.
    """
    before, after = flatten(run.config()), flatten(now)
    changed = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    wrong = [key for key in changed if is_in(key, DECIDES[run.stage]) and not is_in(key, MAY_CHANGE)]
    if wrong:
        named = "; ".join(f"{key} was {_text(before.get(key))} and is {_text(after.get(key))} now" for key in wrong[:3])
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        typed = run.facts.get("options")
        where = "they are in its config.yaml." if typed is None else shell.train_command(*typed, *place)
        raise UserError(
            f"resume= continues a run with other options than it was started with: {named}{more}. Give the options "
            f"that it was started with: {where}"
        )
    shown = [key for key in changed if key in SHOWN and key != "optimizer.build.lr"]
    return [f"{key} {_text(before.get(key))} -> {_text(after.get(key))}" for key in shown]


def _text(value: Any) -> str:
    return one_line(str(value))[:60]
