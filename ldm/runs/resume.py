"""Resuming a run: its folder, its checkpoint, and which options must not change."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ldm.cli.command_line import CommandLine, is_key_under
from ldm.data.cache import describe_change
from ldm.errors import UserError
from ldm.files.untrusted import is_plain_name, to_one_line
from ldm.runs.checkpoints import FOLDER, Manifest, find_checkpoint, find_run_folder, list_checkpoints
from ldm.runs.replacement import recover
from ldm.runs.run import Run
from ldm.runtime import launcher, shell
from ldm.runtime.paths import is_run
from ldm.tracking.artifact import flatten

FIXED_IN_BOTH_STAGES = (
    *("seed", "batch_size", "latent_statistics", "init_from", "optimizer"),
    *("data.resolution", "data.resize", "data.flip", "data.val_fraction"),
)
FIXED_OPTIONS = {
    "vae": (*FIXED_IN_BOTH_STAGES, "autoencoder", "regulariser", "perceptual", "adversarial"),
    "diffusion": (
        *(*FIXED_IN_BOTH_STAGES, "network", "schedule", "objective", "variance", "conditioning"),
        *("data.caption_column", "data.label_column"),
    ),
}
"""Config keys of each stage that determine the weights, data order and noise. A resumed run must not change them.

The images themselves are compared by fingerprint in `ResumePlan.check_inputs`.
"""
CHANGEABLE_OPTIONS = (
    *("optimizer.lr", "optimizer.build.lr", "optimizer.warmup_steps", "optimizer.decay"),
    *("autoencoder.lr", "conditioning.guidance", "conditioning.prompts"),
)
"""Exceptions to FIXED_OPTIONS."""
EARLIER_DEFAULTS = {
    "autoencoder.decoder_noise": (0.0, "autoencoder.loss._target_"),
    "autoencoder.decoder_share": (0.45, "autoencoder.loss._target_"),
    "autoencoder.lr": (1e-3, "autoencoder.loss._target_"),
    "network.scale_shift": (False, "network.attention_levels"),
}
"""Options missing from runs of earlier versions: the value that those versions effectively used, and an option that
every config has to which the missing option applies."""
REPORTED_OPTIONS = (
    *CHANGEABLE_OPTIONS,
    *("trainer.max_steps", "trainer.max_time", "trainer.gradient_clip_val", "trainer.ema_decay"),
)
"""Options that users change on purpose when resuming a run. Changes are listed in the table printed before training."""


@dataclass(frozen=True)
class ResumePlan:
    """The folder of a run, and the checkpoint to resume from, if any.

    `from_config` chooses the folder from the command line. Once the folder is locked, `with_checkpoint` adds the
    checkpoint.

    Args:
        folder: Run folder.
        stage: Stage of the run, "vae" or "diffusion".
        resume: Value of resume=: False, True for the newest intact checkpoint, or the path of a checkpoint.
        overwrite: True to replace an existing run in the folder.
        has_name: True if the user chose a name with name=.
        options: Command-line options of the run, except those that select its folder.
        checkpoint: Checkpoint to resume from; None to train from scratch.
        source_facts: run.json of the run that saved the checkpoint.
        changed_options: Option changes worth reporting since the checkpoint was saved, such as
            "optimizer.lr 0.001 -> 0.0005".
    """

    folder: Path
    stage: str
    resume: bool | Path
    overwrite: bool
    has_name: bool
    options: tuple[str, ...]
    checkpoint: Manifest | None = None
    source_facts: Mapping[str, Any] = field(default_factory=dict)
    changed_options: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: DictConfig, command: CommandLine, *, main_process: bool) -> "ResumePlan":
        """Choose the run folder, runs_dir/<stage>/<name>.

        resume=<checkpoint> without name= continues the run that saved the checkpoint. Together with name=, it starts a
        new run from the checkpoint. A job restarted by SLURM resumes from its own newest checkpoint, even if the
        job was originally started from a different checkpoint.

        Raises:
            UserError: if the folder contains a run, and neither resume= nor overwrite= is set.
        """
        resume, has_name = read_resume(config)
        stage = command.choices["stage"]
        name = str(config.name) if has_name else default_name(command)
        name = launcher.share_run_name(name, main_process=main_process)
        if not is_plain_name(name) or len(name.encode()) > 200:
            raise UserError(
                f"name={name} must be a plain folder name of at most 200 bytes, without slashes or control characters. "
                "To save runs elsewhere, use runs_dir=."
            )
        plan = cls(
            folder=Path(config.runs_dir).expanduser() / stage / name,
            stage=stage,
            resume=resume if isinstance(resume, bool) else Path(str(resume)).expanduser(),
            overwrite=config.overwrite,
            has_name=has_name,
            options=tuple(command.options_to_resume(config)),
        )
        if main_process:
            recover(plan.folder, resume=resume is True and not config.overwrite)
        plan, continues = plan._resolve()
        if main_process and is_run(plan.folder) and not (continues or config.overwrite):
            multirun = " With -m, give each job its own name with 'name=NAME-${hydra:job.num}', or omit name=."
            raise UserError(
                f"{plan.folder} already exists. Choose another name=, resume the run with resume=true, or replace it "
                f"with overwrite=true.{multirun if command.job is not None else ''}"
            )
        return plan

    def _resolve(self) -> tuple["ResumePlan", bool]:
        """Apply resume=<checkpoint> and SLURM restarts. Also return True if the run in the folder is continued."""
        is_restart = launcher.is_restarted_by_slurm()
        if is_restart and self.has_name and not self.resume and is_run(self.folder):
            job = Run.open(self.folder).facts.get("slurm_job")
            if not self.overwrite or job == launcher.slurm_job():  # a job never overwrites the run that it started
                return replace(self, resume=True), True
        if isinstance(self.resume, bool):
            return self, self.resume
        folder = self.folder if self.has_name else self.resume.parent.parent
        has_saved = has_saved_since(folder, self.resume)
        if is_restart and has_saved:
            return replace(self, folder=folder, resume=True), True
        source = find_run_folder(self.resume)
        if not self.has_name:
            return replace(self, folder=source), True
        # a run that was stopped before its first save starts over from the given checkpoint
        return self, source.resolve() == self.folder.resolve() or has_saved is False

    def with_checkpoint(self, config: Mapping[str, Any]) -> "ResumePlan":
        """Return a copy with the checkpoint to resume from. Call it while the folder is locked.

        Args:
            config: Config of this command, as plain values.

        Raises:
            UserError: if no checkpoint is intact, or an option would change the resulting weights.
        """
        checkpoint = find_checkpoint(self.folder, self.resume, stage=self.stage)
        if checkpoint is None:
            return self
        run = Run.open(replace(self, checkpoint=checkpoint).source, "resume")
        resume_options = [*folder_options(self.folder), f"resume={'true' if self.resume is True else self.resume}"]
        changed = check_resume_options(run, config, resume_options)
        return replace(self, checkpoint=checkpoint, source_facts=run.facts, changed_options=tuple(changed))

    @property
    def source(self) -> Path:
        """Folder of the run that saved the checkpoint."""
        return self.folder if self.checkpoint is None else self.checkpoint.path.parent.parent

    @property
    def is_same_run(self) -> bool:
        """True if the checkpoint is from this run's own folder, so that its logs are continued."""
        return self.checkpoint is not None and self.source.resolve() == self.folder.resolve()

    @property
    def branch(self) -> dict[str, Any] | None:
        """Entry `branch` of run.json: the path given by resume=, and the newest save in the folder at that time."""
        if isinstance(self.resume, bool):
            return self.source_facts.get("branch")
        newest_sequence = max((manifest.sequence for manifest in list_checkpoints(self.folder / FOLDER)), default=-1)
        return {"file": str(self.resume.resolve()), "after": newest_sequence}

    def stop_message(self, reason: str, *, has_replaced_run: bool) -> str:
        """Return the message for a training run stopped by a signal, with the command to continue it.

        Args:
            reason: Why training stopped.
            has_replaced_run: True once overwrite=true has deleted the earlier run. Before that, resume=true would
                resume the earlier run.
        """
        mode = "resume=true"
        if not isinstance(self.resume, bool) and not has_saved_since(self.folder, self.resume):
            mode = f"resume={self.resume}"
        elif self.overwrite and not has_replaced_run:
            mode = "overwrite=true"
        return f"{reason}. To continue: {shell.train_command(*self.options, *folder_options(self.folder), mode)}"

    def requeue(self) -> str:
        """Requeue the SLURM job if a restart could find this run. Return the outcome as text to append to a message."""
        if self.has_name or not isinstance(self.resume, bool) or not launcher.slurm_job():
            return launcher.requeue()
        return ". The SLURM job was not requeued: without name=, each restart would begin a new run"

    def check_inputs(self, facts: Mapping[str, Any]) -> None:
        """Check that the digests of the images and the autoencoder are the same as in the earlier run.

        Raises:
            UserError: if they differ. The message contains both digests.
        """
        expected, digest = (content.get("data_fingerprint") for content in (self.source_facts, facts))
        if expected is not None and expected != digest:
            change = describe_change(Path(self.source_facts.get("data_cache", "")), Path(facts["data_cache"]))
            change = change or f"its fingerprint was {str(expected)[:12]} and is {str(digest)[:12]} now"
            raise UserError(
                f"The run cannot be resumed, because its data {facts['data']} has changed: {change}. Restore the "
                "original data, select it with the data options in the run's config.yaml, or start a new run with a "
                "different name=."
            )
        expected, digest = (
            content.get("contract", {}).get("autoencoder_sha256") for content in (self.source_facts, facts)
        )
        if expected is not None and expected != digest:
            raise UserError(
                f"The run to resume was trained with vae={self.source_facts.get('vae')} ({str(expected)[:12]}), but "
                f"this command uses vae={facts.get('vae')} ({str(digest)[:12]}). Use the vae= option in its "
                "config.yaml, or start a new run with a different name=."
            )


def read_resume(config: DictConfig) -> tuple[bool | str, bool]:
    """Return the value of resume= (True, False or the path of a checkpoint), and True if the run has a name.

    Raises:
        UserError: for resume=true without a name.
    """
    resume, has_name = {None: False, "true": True}.get(config.resume, config.resume), config.name not in (None, "")
    if resume is True and not has_name:
        raise UserError("resume=true needs name=NAME, the name of the run's folder in runs/<stage>/.")
    return resume, has_name


def default_name(command: CommandLine) -> str:
    """Return a run name made of data, model and time. In a multirun, append the job number to keep names unique."""
    model = command.choices["autoencoder" if command.choices["stage"] == "vae" else "network"]
    name = f"{command.choices['data']}-{model}-{time.strftime('%Y%m%d-%H%M%S')}"
    return name if command.job is None else f"{name}-{command.job}"


def folder_options(folder: Path) -> list[str]:
    """Return the options that select a run folder: name=, and runs_dir= unless it is the default."""
    runs = str(folder.parent.parent)
    return [*([] if runs == "runs" else [f"runs_dir={runs}"]), f"name={folder.name}"]


def has_saved_since(folder: Path, checkpoint: Path) -> bool | None:
    """Return True if the run in `folder` was started from this checkpoint and has saved a checkpoint since then.

    Return None if it was not started from this checkpoint.
    """
    branch = (Run.open(folder).facts.get("branch") or {}) if is_run(folder) else {}
    if branch.get("file") != str(checkpoint.expanduser().resolve()):
        return None
    return any(manifest.sequence > branch["after"] for manifest in list_checkpoints(folder / FOLDER))


def check_resume_options(run: Run, config: Mapping[str, Any], resume_options: Sequence[str]) -> list[str]:
    """Check that the options of this command do not change the weights of the resumed run.

    Args:
        config: Config of this command, as plain values.
        resume_options: Options that select the run and its checkpoint.

    Returns:
        The allowed changes worth reporting, such as "optimizer.lr 0.001 -> 0.0005".

    Raises:
        UserError: if an option would change the weights. The message lists the changed options and the right command.
    """
    saved, new = flatten(run.config()), flatten(config)
    added = {
        key: value
        for key, (value, sibling) in EARLIER_DEFAULTS.items()
        if is_key_under(key, FIXED_OPTIONS[run.stage]) and sibling in saved and key not in saved
    }
    saved |= added
    changed_keys = [key for key in sorted({*saved, *new}) if saved.get(key) != new.get(key)]
    fixed_keys = [key for key in changed_keys if is_key_under(key, FIXED_OPTIONS[run.stage])]
    rejected_keys = [key for key in fixed_keys if not is_key_under(key, CHANGEABLE_OPTIONS)]
    if rejected_keys:
        differences = [f"{key} was {_text(saved.get(key))} and is {_text(new.get(key))} now" for key in rejected_keys]
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        options = run.facts.get("options")
        added_options = [f"{key}={value}".lower() for key, value in added.items()]
        options = None if options is None else [*options, *added_options]
        command = "see the run's config.yaml." if options is None else shell.train_command(*options, *resume_options)
        raise UserError(
            f"The run cannot be resumed with these options: {'; '.join(differences[:3])}{more}. Use the options that "
            f"the run was started with: {command}"
        )
    reported_keys = [key for key in changed_keys if key in REPORTED_OPTIONS and key != "optimizer.build.lr"]
    return [f"{key} {_text(saved.get(key))} -> {_text(new.get(key))}" for key in reported_keys]


def _text(value: Any) -> str:
    return to_one_line(str(value))[:60]
