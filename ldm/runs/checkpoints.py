"""What is known of a saved checkpoint: checkpoints/step-00001200.ckpt has step-00001200.json beside it.

The checkpoint is written first and its manifest after it: one without a manifest was never finished, and counts for
nothing.
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
REMEDY = "Name a checkpoint as training leaves it: resume=<run folder>/checkpoints/step-*.ckpt."


@dataclass(frozen=True)
class Manifest:
    """A checkpoint that was saved whole.

    Args:
        path: The checkpoint itself.
        stage: Of the run.
        step: Optimizer steps done.
        trained_s: Seconds of training, those before a resume included.
        sequence: Counts a run's saves, so that the newest is known where a run went back to an earlier step.
        saved: When, as seconds since 1970.
        save_s: How long saving took.
        figure: The monitored validation figure at this step, where there is one.
        best: It was the lowest of the run so far.
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
        return self.path.with_suffix(".json")

    @property
    def last_row(self) -> int:
        """The last step that metrics.csv has rows of: steps count from 0, and after the end comes a validation."""
        return self.step if self.why == "end" else self.step - 1

    def write(self) -> None:
        content = {key: value for key, value in asdict(self).items() if key != "path"}
        write_text(self.file, json.dumps({"format": FORMAT, **content}, indent=2) + "\n")

    @classmethod
    def read(cls, file: Path) -> "Manifest":
        """Read a manifest.

        Raises:
            UserError: it is damaged, or of another format.
        """
        content = read_json(file)
        if (found := content.pop("format", None)) != FORMAT:
            raise UserError(f"{file} has format {found}; this version reads {FORMAT}.")
        return to_dataclass(cls, {**content, "path": file.with_suffix(".ckpt")}, file)

    def fault(self) -> str | None:
        """What is wrong with the checkpoint, if anything: its file is read from beginning to end."""
        if not self.path.is_file():
            return "the file is missing"
        if (size := self.path.stat().st_size) != self.bytes:
            return f"it has {size} bytes, and was saved with {self.bytes}"
        try:
            if (found := sha256_of_file(self.path)) != self.sha256:
                return f"its SHA-256 is {found[:12]}, and was {str(self.sha256)[:12]} when it was saved"
        except OSError as error:
            return f"it cannot be read: {error.strerror}"
        return None

    def remove(self) -> None:
        """Delete the checkpoint, the manifest first: what has none does not count."""
        self.file.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def manifests(folder: Path, *, quiet: bool = True) -> list[Manifest]:
    """The checkpoints of a folder, the newest first. Damaged manifests are named, unless `quiet`."""
    found = []
    for file in folder.glob("step-*.json"):
        try:
            found.append(Manifest.read(file))
        except UserError as error:
            if not quiet:
                warn(f"{error} The checkpoint beside it is not used.")
    return sorted(found, key=lambda manifest: manifest.sequence, reverse=True)


def prune(folder: Path, branch: list[Manifest], keep_last: int) -> None:
    """Delete all checkpoints of a folder but the first of a branch's, which are its newest, and its best one."""
    ranked = sorted((found.figure, found.sequence, found.path) for found in branch if found.figure is not None)
    kept = {found.path for found in branch[:keep_last]} | {path for _, _, path in ranked[:1]}
    for found in manifests(folder):
        if found.path not in kept:
            found.remove()
    for path in folder.glob("step-*.ckpt"):
        if not path.with_suffix(".json").exists():
            path.unlink()  # a kill came between the checkpoint and its manifest


def find_checkpoint(folder: Path, resume: bool | Path, *, stage: str) -> Manifest | None:
    """The checkpoint to continue from: the newest whole one of the run folder, or the file that is named.

    None to start anew: nothing was asked for, or nothing was saved yet, so that a job that is started again and again
    may always say resume=true.

    Raises:
        UserError: there is no such file, none of them is whole, or it is of another stage.
    """
    if not resume:
        return None
    if isinstance(resume, Path):
        return _named(resume, stage)
    place = folder / FOLDER
    for manifest in manifests(place, quiet=False):
        if (fault := manifest.fault()) is None:
            return manifest
        warn(f"{manifest.path} is damaged: {fault}. The one before it is used.")
    if any(place.glob("step-*.json")) or (place / "last.ckpt").is_file():  # so an earlier version named its own
        raise UserError(
            f"resume={resume}: none of the checkpoints in {place} is whole. Start anew with overwrite=true instead of "
            "resume=, or bring one of them back from a backup, with the json beside it."
        )
    warn(f"resume={resume}: nothing was saved in {folder} yet. Training starts from the beginning.")
    return None


def run_of(path: Path) -> Path:
    """The run folder of a checkpoint that the user names.

    Raises:
        UserError: it is none that training left in one.
    """
    run = path.parent.parent
    if path.parent.name != FOLDER or not is_run(run) or path.suffix != ".ckpt" or not path.is_file():
        raise UserError(f"resume={path}: there is no such checkpoint in the {FOLDER} folder of a run. {REMEDY}")
    if not path.with_suffix(".json").is_file():
        raise UserError(f"resume={path} has no manifest beside it: it was not saved to its end. {REMEDY}")
    return run


def _named(path: Path, stage: str) -> Manifest:
    run_of(path)
    manifest = Manifest.read(path.with_suffix(".json"))
    if (fault := manifest.fault()) is not None:
        raise UserError(f"resume={path} is damaged: {fault}. Use another one, or resume=true for the newest whole one.")
    if manifest.stage != stage:
        raise UserError(f"resume={path} is of stage={manifest.stage}, and this is stage={stage}. {REMEDY}")
    return manifest
