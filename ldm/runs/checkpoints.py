"""What is known of a saved checkpoint: checkpoints/step-00001200.ckpt has step-00001200.json beside it.

The checkpoint is written first and its manifest after it: one without a manifest was never finished, and counts for
nothing.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ldm.errors import UserError
from ldm.files.atomic import write_text
from ldm.files.digest import sha256_of_file
from ldm.runtime.paths import RUN_FILE

FORMAT = 1
FOLDER = "checkpoints"
REMEDY = "Name a checkpoint as training leaves it: resume=<run folder>/checkpoints/step-*.ckpt."
Why = Literal["interval", "validation", "end", "signal"]


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
    why: Why
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
            ValueError: it is damaged, or of another format.
        """
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if (found := content.pop("format", None)) != FORMAT:
                raise ValueError(f"has format {found}; this version reads {FORMAT}")
            manifest = cls(path=file.with_suffix(".ckpt"), **content)
        except (TypeError, AttributeError, OSError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot be read: {' '.join(str(error).split())}") from error
        numbers = (manifest.step, manifest.sequence, manifest.bytes)
        if any(type(number) is not int or number < 0 for number in numbers) or type(manifest.trained_s) is bool:
            raise ValueError("holds something else than numbers")
        if not isinstance(manifest.trained_s, int | float) or not isinstance(manifest.figure, int | float | None):
            raise ValueError("holds something else than numbers")
        return manifest

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
        except ValueError as error:
            if not quiet:
                _warn(f"{file} {error}. The checkpoint beside it is not used.")
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


def find_checkpoint(folder: Path, resume: bool | Path, *, stage: str, quiet: bool = False) -> Manifest | None:
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
    known = manifests(place, quiet=quiet)
    for manifest in known:
        if (fault := manifest.fault()) is None:
            return manifest
        if not quiet:
            _warn(f"{manifest.path} is damaged: {fault}. The one before it is used.")
    if known or any(place.glob("step-*.json")):
        raise UserError(
            f"resume={resume}: none of the checkpoints in {place} is whole. Start anew with overwrite=true instead of "
            "resume=, or bring one of them back from a backup, with the json beside it."
        )
    if (old := place / "last.ckpt").is_file():
        raise UserError(
            f"resume={resume}: {old} was saved by an earlier version, without a manifest to check it by. Continue that "
            "run with the version that began it, or start anew with overwrite=true instead of resume=."
        )
    if not quiet:
        _warn(f"resume={resume}: nothing was saved in {folder} yet. Training starts from the beginning.")
    return None


def run_of(path: Path) -> Path:
    """The run folder of a checkpoint that the user names.

    Raises:
        UserError: it is none that training left in one.
    """
    if not path.is_file():
        raise UserError(f"resume={path}: there is no checkpoint {path}. {REMEDY}")
    folder, file = path.parent, path.with_suffix(".json")
    if folder.name != FOLDER or not (folder.parent / RUN_FILE).is_file() or path.suffix != ".ckpt":
        raise UserError(f"resume={path} does not lie in the {FOLDER} folder of a run. {REMEDY}")
    if not file.is_file():
        raise UserError(
            f"resume={path} has no manifest {file.name} beside it: it was not saved to its end, or by an earlier "
            f"version. {REMEDY}"
        )
    return folder.parent


def _named(path: Path, stage: str) -> Manifest:
    run_of(path)
    file = path.with_suffix(".json")
    try:
        manifest = Manifest.read(file)
    except ValueError as error:
        raise UserError(f"resume={path}: {file} {error}. {REMEDY}") from error
    if (fault := manifest.fault()) is not None:
        raise UserError(f"resume={path} is damaged: {fault}. Use another one, or resume=true for the newest whole one.")
    if manifest.stage != stage:
        raise UserError(f"resume={path} is of stage={manifest.stage}, and this is stage={stage}. {REMEDY}")
    return manifest


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
