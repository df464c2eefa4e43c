"""Saved checkpoints and their manifests: checkpoints/step-00001200.ckpt and step-00001200.json.

The manifest is written after the checkpoint. A checkpoint without a manifest is incomplete and is ignored.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ldm.errors import UserError
from ldm.files.atomic import write_text
from ldm.files.digest import sha256_of_file
from ldm.files.untrusted import read_json, to_dataclass
from ldm.runtime.distributed import warn
from ldm.runtime.paths import is_run

FORMAT = 1
FOLDER = "checkpoints"
REMEDY = "Use a checkpoint saved by training: resume=<run folder>/checkpoints/step-*.ckpt."


@dataclass(frozen=True)
class Manifest:
    """Manifest of a checkpoint that was written completely.

    Args:
        path: Checkpoint file.
        stage: Stage of the run, "vae" or "diffusion".
        step: Number of completed optimizer steps.
        trained_s: Training time so far in seconds, including the time before a resume.
        sequence: Index of this save within the run. Unlike the step, the index always increases, even if the run was
            resumed from an earlier step.
        sha256, bytes: Digest and size of the checkpoint file.
        saved: Unix time of the save.
        save_s: Duration of the save in seconds.
        why: Reason for the save; "end" at the end of training.
        monitored: Name of the monitored validation metric.
        figure: Value of the monitored metric at this step; None if it was not measured.
        best: True if `figure` is the lowest value in the run so far.
    """

    path: Path
    stage: str
    step: int
    trained_s: float
    sequence: int
    sha256: str
    bytes: int
    saved: float
    save_s: float
    why: str
    monitored: str
    figure: float | None = None
    best: bool = False

    @property
    def file(self) -> Path:
        """Path of the manifest."""
        return self.path.with_suffix(".json")

    @property
    def last_row(self) -> int:
        """Last step logged to metrics.csv before this save.

        Steps are numbered from 0, so the last one is `step` - 1. At the end of training, the final validation is logged
        at `step`.
        """
        return self.step if self.why == "end" else self.step - 1

    def write(self) -> None:
        content = {key: value for key, value in asdict(self).items() if key != "path"}
        write_text(self.file, json.dumps({"format": FORMAT, **content}, indent=2) + "\n")

    @classmethod
    def read(cls, file: Path) -> "Manifest":
        """Read a manifest.

        Raises:
            UserError: if the file is damaged or has an unsupported format.
        """
        content = read_json(file)
        if (version := content.pop("format", None)) != FORMAT:
            raise UserError(f"{file} has format {version}; this version reads {FORMAT}.")
        return to_dataclass(cls, {**content, "path": file.with_suffix(".ckpt")}, file)

    def find_damage(self) -> str | None:
        """Check the size and digest of the checkpoint file. Return the problem found; None if it is intact."""
        if not self.path.is_file():
            return "the file is missing"
        if (size := self.path.stat().st_size) != self.bytes:
            return f"its size is {size} bytes instead of {self.bytes}"
        try:
            if (digest := sha256_of_file(self.path)) != self.sha256:
                return f"its SHA-256 is {digest[:12]} instead of {str(self.sha256)[:12]}"
        except OSError as error:
            return f"it cannot be read: {error.strerror}"
        return None

    def remove(self) -> None:
        """Delete the manifest, then the checkpoint, so that an interrupted deletion leaves no valid checkpoint."""
        self.file.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def list_checkpoints(folder: Path, *, quiet: bool = True) -> list[Manifest]:
    """Return the checkpoints in a folder, newest first. Warn about damaged manifests unless `quiet`."""
    checkpoints = []
    for file in folder.glob("step-*.json"):
        try:
            checkpoints.append(Manifest.read(file))
        except UserError as error:
            if not quiet:
                warn(f"{error} The checkpoint next to it is ignored.")
    return sorted(checkpoints, key=lambda manifest: manifest.sequence, reverse=True)


def prune(folder: Path, branch: list[Manifest], keep_last: int) -> None:
    """Delete all checkpoints in a folder except the `keep_last` newest and the best of a branch.

    Args:
        branch: Checkpoints that the current weights descend from, newest first.
    """
    candidates = sorted((entry.figure, entry.sequence, entry.path) for entry in branch if entry.figure is not None)
    paths_to_keep = {entry.path for entry in branch[:keep_last]} | {path for _, _, path in candidates[:1]}
    for manifest in list_checkpoints(folder):
        if manifest.path not in paths_to_keep:
            manifest.remove()
    for path in folder.glob("step-*.ckpt"):
        if not path.with_suffix(".json").exists():
            path.unlink()  # training was killed before it wrote the manifest


def find_checkpoint(folder: Path, resume: bool | Path, *, stage: str) -> Manifest | None:
    """Return the checkpoint to resume from: the newest intact one of the run folder, or the given file.

    Return None, to train from scratch, if resume= is not set or nothing has been saved yet. A job that is restarted
    automatically can therefore always use resume=true.

    Raises:
        UserError: if the file does not exist or is from a different stage, or if no checkpoint is intact.
    """
    if not resume:
        return None
    if isinstance(resume, Path):
        return _open_checkpoint(resume, stage)
    checkpoints = folder / FOLDER
    for manifest in list_checkpoints(checkpoints, quiet=False):
        if (damage := manifest.find_damage()) is None:
            return manifest
        warn(f"{manifest.path} is damaged: {damage}. Trying the previous checkpoint.")
    if any(checkpoints.glob("step-*.json")) or (checkpoints / "last.ckpt").is_file():  # from older versions
        raise UserError(
            f"resume={resume}: {checkpoints} contains no intact checkpoint. Start over with overwrite=true instead of "
            "resume=, or restore a checkpoint and its .json file from a backup."
        )
    warn(f"resume={resume}: nothing has been saved in {folder} yet. Training from scratch.")
    return None


def find_run_folder(path: Path) -> Path:
    """Return the run folder of a checkpoint given by the user.

    Raises:
        UserError: if the file is not a checkpoint in a run folder, or has no manifest.
    """
    run = path.parent.parent
    if path.parent.name != FOLDER or not is_run(run) or path.suffix != ".ckpt" or not path.is_file():
        raise UserError(f"resume={path} is not a checkpoint in the {FOLDER} folder of a run. {REMEDY}")
    if not path.with_suffix(".json").is_file():
        raise UserError(f"resume={path} has no manifest ({path.stem}.json), so it is incomplete. {REMEDY}")
    return run


def _open_checkpoint(path: Path, stage: str) -> Manifest:
    find_run_folder(path)
    manifest = Manifest.read(path.with_suffix(".json"))
    if (damage := manifest.find_damage()) is not None:
        raise UserError(
            f"resume={path} is damaged: {damage}. Use a different checkpoint, or resume=true for the newest intact one."
        )
    if manifest.stage != stage:
        raise UserError(f"resume={path} was saved with stage={manifest.stage}, not stage={stage}. {REMEDY}")
    return manifest
