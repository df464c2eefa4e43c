"""The trainings of a sweep, one after the other: what is new is begun, what was interrupted goes on, the rest is kept.

Each is a process of the front door's, so that none of them shares memory, threads or random state with another, and
any of them can be continued or repeated by hand. The folder of a sweep:

runs/sweeps/<name>/  sweep.json  sweep.png  vae/<size>-<loss>/, run folders
"""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ldm.cli.main import environment_of_children
from ldm.errors import UserError
from ldm.evaluation.latents.sweep import SweepTraining, overrides_by_key
from ldm.files.atomic import write_text
from ldm.files.untrusted import check_fields, read_json
from ldm.runs.checkpoints import FOLDER
from ldm.runs.run import RUN_FILE, Run
from ldm.runtime import shell, signals

SWEEP_FILE = "sweep.json"
NEW, CONTINUED, KEPT = "new", "continued", "finished, kept"
GRACE_S = 30
"""How long a training that is stopped may take to save its checkpoint."""


def known_trainings(folder: Path) -> dict[str, Any]:
    """By name, the overrides that each training of this folder was started with.

    Raises:
        UserError: the folder's file cannot be read.
    """
    return _read_sweep_file(folder).get("trainings", {})


def _read_sweep_file(folder: Path) -> dict[str, Any]:
    file = folder / SWEEP_FILE
    if not file.is_file():
        return {}
    try:
        content = read_json(file)
        check_fields(content, {"trainings": dict}, file, required=False)
        known = content.get("trainings", {})
        check_fields(known, dict.fromkeys(known, list[str]), file)
    except UserError as error:
        raise UserError(
            f"{error} Or choose another name=; the trainings in {folder} are then left as they are."
        ) from error
    return content


def training_state(training: SweepTraining, folder: Path, known: Mapping[str, Sequence[str]]) -> str:
    """Whether a training is new, to be continued, or finished.

    Raises:
        UserError: its folder holds a run of other options.
    """
    place = training.folder(folder)
    if not (place / RUN_FILE).is_file():
        return NEW
    remedy = f"Choose another name=, or delete the folder {place}."
    if training.name not in known:
        raise UserError(f"{place} holds a run of which {folder / SWEEP_FILE} knows nothing. {remedy}")
    then, now = overrides_by_key(known[training.name]), overrides_by_key(training.overrides)
    for key in sorted(then.keys() | now.keys()):
        if (before := then.get(key)) != (after := now.get(key)):
            raise UserError(
                f"{place} was trained with {key} = {before or '(default)'}, and this command asks for "
                f"{after or '(default)'}. {remedy}"
            )
    return KEPT if Run.open(place).finished else CONTINUED


def run_trainings(trainings: Sequence[SweepTraining], folder: Path) -> None:
    """Run what is new, continue what was interrupted, keep what is finished.

    Raises:
        UserError: as `training_state` says, before any training; or one of them failed, and the others were not begun.
        KeyboardInterrupt: the user stopped it; the training of that moment has saved its checkpoint.
    """
    known = known_trainings(folder)
    states = {training.name: training_state(training, folder, known) for training in trainings}
    folder.mkdir(parents=True, exist_ok=True)
    for number, training in enumerate(trainings, start=1):
        found, place = states[training.name], training.folder(folder)
        print(f"\n{number} of {len(trainings)}: {training.size} {training.loss}: {found}", flush=True)
        if found == KEPT:
            continue
        update_sweep_file(folder, trainings=known_trainings(folder) | {training.name: training.overrides})
        checkpoint = any((place / FOLDER).glob("step-*.json"))
        again = found == CONTINUED
        command = [*training.arguments(folder), *(["resume=true" if checkpoint else "overwrite=true"] if again else [])]
        try:
            code = run_process([sys.executable, *command])
            if code - 128 in signals.HANDLED:
                raise signals.Interrupted(code - 128)
            if code == -signal.SIGINT:
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            print(f"\n{training.name} was stopped. The same command goes on from there.", file=sys.stderr, flush=True)
            raise
        if code:
            raise UserError(
                f"The training {training.name} in {place} ended with exit code {code}, for the reason that it gave "
                f"above. Its command was: {shell.python(*command)}. Those before it are kept: when the "
                "reason is mended, the same sweep goes on."
            )


def describe_time_left(trainings: Sequence[SweepTraining], folder: Path, minutes: float) -> str:
    """In words: the training that is left, at most."""
    known = known_trainings(folder)
    left = sum(training_state(training, folder, known) != KEPT for training in trainings)
    if not left:
        return "all are finished, and only measured"
    return (
        f"{left} x {minutes:g} = {left * minutes:g} minutes of training at most, and some for start-up and measurement"
    )


def run_process(command: Sequence[str]) -> int:
    """Run a process in front of the user and return its exit code; it ends before this does."""
    with subprocess.Popen(command, env=environment_of_children()) as process:
        try:
            return process.wait()
        except KeyboardInterrupt as stopped:
            try:
                if isinstance(stopped, signals.Interrupted) and stopped.signal != signal.SIGINT:
                    process.send_signal(stopped.signal)
                process.wait(GRACE_S)  # a terminal's Ctrl-C reached it too
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
            raise


def update_sweep_file(folder: Path, **parts: Any) -> Path:
    """Put parts into the sweep's file, beside those that it has."""
    file = folder / SWEEP_FILE
    write_text(file, json.dumps(_read_sweep_file(folder) | parts, indent=2) + "\n")
    return file


def training_table(trainings: Sequence[SweepTraining], folder: Path, resolution: int) -> Table:
    """What will be trained."""
    known = known_trainings(folder)
    table = Table(title=f"latent sizes of {resolution} x {resolution} px, in {folder}", title_justify="left")
    for name in ("size", "loss", "latent", "values per image", "pixel values per value", "state"):
        table.add_column(name, justify="right" if "value" in name else "left")
    for training in trainings:
        size, side = training.size, resolution // training.size.factor
        values = size.num_values(resolution)
        shape, compression = f"{size.channels} x {side} x {side}", f"{3 * resolution**2 / values:.1f}"
        table.add_row(
            str(size), training.loss, shape, str(values), compression, training_state(training, folder, known)
        )
    return table
