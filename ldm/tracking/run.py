"""W&B behind one small face: a run that logs numbers, pictures and what was made from what, and never asks or waits.

Whatever W&B raises, training is worth more than its record: a run that cannot reach its server goes on offline under
the same id, says so in one line, and can be uploaded later.
"""

import contextlib
import json
import os
import re
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.errors import UserError
from ldm.files.atomic import write_text
from ldm.runtime import shell
from ldm.tracking.artifact import Artifact, flatten, sha256
from ldm.tracking.server import bounded, choose_mode, has_key

ID_FILE = "wandb_id.txt"
TRAINING_ID = "training_id"
"""Key in the config of a tool's run: the id of the training that it is of."""
OFFLINE_TIMEOUT_S = 30.0
"""For W&B's own process to start; there is no server to wait for."""
PLAIN: dict[str, Any] = {"project": "ldm", "entity": None, "group": None, "tags": []}
"""What a run is recorded under where W&B rejects what was asked for."""
DEFAULTS = PLAIN | {"mode": None, "timeout_s": 30.0, "finish_timeout_s": 300.0, "max_artifact_mb": 1000.0}
OPTIONS = tuple(DEFAULTS)
"""What is read of the config group `logger` for any run."""


class WandbRun:
    """One run in W&B, its id kept in the run folder so that a resumed run continues it. Nothing that W&B raises passes.

    Args:
        options: Of OPTIONS, those that are not to be DEFAULTS. `timeout_s` is the most that the start and each artifact
            wait for the server, `finish_timeout_s` the most that the end waits for what is still to be uploaded; of
            artifacts larger than `max_artifact_mb` the description alone is logged.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], *, name: str, resume: bool = False, **options: Any
    ) -> None:
        # their telemetry would hold up the end of the process for 20 s where the server does not answer
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        options = DEFAULTS | options
        self.folder, self.timeout_s = folder, options["timeout_s"]
        self.finish_timeout_s, self.max_artifact_mb = options["finish_timeout_s"], options["max_artifact_mb"]
        known: str | None = None
        try:
            known = known_id(folder) if resume else None
        except (UserError, OSError) as error:
            print(f"warning: {error}", flush=True)
        asked = {key: options[key] for key in PLAIN}
        named = {"id": known or uuid.uuid4().hex[:8], "name": name, "job_type": name.partition("/")[0]}
        self._options: dict[str, Any] = {"dir": folder, **named, **asked, "config": flatten(config)}
        self._wandb: Any = None
        self.run: Any = None
        """W&B's own; None where it takes no run at all, or none is asked for."""
        self._row, self._records, self._inputs = -1, list[str](), dict[str, str]()
        self._continues = known is not None
        self._start_in([(options["mode"], {}), ("offline", {}), ("offline", PLAIN)])
        with contextlib.suppress(OSError):
            write_text(folder / ID_FILE, f"{self._options['id']}\n")

    def _start_in(self, ways: Sequence[tuple[str | None, Mapping[str, Any]]], error: Exception | None = None) -> None:
        """Start in the first of these ways that works, else go on without a record; an error is said in one line.

        Args:
            ways: Modes, with what takes the place of our settings.
            error: Why the run is started again.
        """
        used: Mapping[str, Any] = {}
        for mode, used in ways:
            self._options |= used
            try:
                self._start(mode)
                break
            except Exception as refused:  # of a server, a setting, a variable, an installation
                error = error or refused
                self._stop()
        else:
            self.mode = "disabled"
        if error is not None:
            self._tell(error, rejected=bool(used))

    def _start(self, mode: str | None) -> None:
        import wandb

        self._wandb = wandb
        self.mode = choose_mode(mode)
        if self.mode == "disabled":
            return
        if self.mode == "online" and not has_key():
            raise UserError("logger.mode=online, but no API key was found")
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=self.timeout_s if self.mode == "online" else OFFLINE_TIMEOUT_S,
            finish_timeout=self.finish_timeout_s,
            finish_timeout_raises=True,
        )
        # marked in the record as well where it is offline: an upload then appends instead of beginning anew
        resume = "allow" if self._continues else None
        options = {**self._options, "tags": list(self._options["tags"]), "mode": self.mode, "resume": resume}
        self.run = wandb.init(**options, settings=settings)
        self._options["id"] = self.run.id  # an agent of a sweep gives it another one than we asked for
        # an axis of our own: W&B drops what comes with a smaller step than the last, as after a validation or a resume
        self.run.define_metric("*", step_metric="step")
        self._row = max(self._row, self.run.step - 1)
        self._records.append(str(self.run.settings.sync_dir))

    def _stop(self) -> None:
        """End W&B's process, which holds on to the run's id or is dead; the run's own threads end with `finish`."""
        run, wandb = self.run, self._wandb
        for end in (lambda: run.finish(), lambda: wandb.teardown()):
            with contextlib.suppress(Exception):
                bounded(end, self.timeout_s)
        self.run = None

    def _tell(self, error: Exception, *, rejected: bool = False) -> None:
        said, _, _ = " ".join(str(error).split()).partition(" Consider increasing")  # their advice, not our option
        going_on = "Continuing without a record."
        if self._records and self.mode != "disabled":
            under = f", in project {PLAIN['project']} without entity, group and tags" if rejected else ""
            upload = shell.python("-m", "wandb", "sync", "--include-online", *self._records)
            going_on = f"Continuing; its record is on disk{under}. To upload it later: {upload}"
        what = "rejects a setting" if rejected else "is not available"
        print(f"W&B {what} ({said[:300] or type(error).__name__}). {going_on}", flush=True)

    def _record(self, call: Callable[[Any], Any]) -> None:
        """`call` with the run; again with the one that takes its place where W&B fails."""
        while self.run is not None:
            try:
                call(self.run)
                return
            except Exception as error:
                self._stop()
                self._continues = True
                self._start_in([("offline", {})] if self.mode == "online" else [], error)

    def _log(self, values: Callable[[], Mapping[str, Any]], step: int) -> None:
        # W&B's own count follows the steps, so that a resumed run's record goes on where the last one ended
        self._row = max(self._row + 1, step)
        row = self._row
        self._record(lambda run: run.log({**values(), "step": step}, step=row, commit=True))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._log(lambda: metrics, step)

    def log_images(self, key: str, images: Sequence[Image.Image], captions: Sequence[str | None], step: int) -> None:
        """A panel of pictures with captions."""
        pairs = list(zip(images, captions, strict=True))
        self._log(lambda: {key: [self._wandb.Image(image, caption=caption) for image, caption in pairs]}, step)

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """A table of texts and numbers."""
        self._log(lambda: {key: self._wandb.Table(columns=list(columns), data=list(map(list, rows)))}, step)

    def summarise(self, values: Mapping[str, Any]) -> None:
        self._record(lambda run: run.summary.update(dict(values)))

    def take(self, item: Artifact) -> None:
        """Say that the run was made from an item: in the config by its digest, and online as an edge of the lineage."""
        self._inputs[item.label] = item.digest
        inputs = {f"inputs.{item.label}": item.digest}
        self._options["config"] |= inputs
        self._record(lambda run: run.config.update(inputs, allow_val_change=True))

        def take(run: Any) -> None:
            if self.mode != "online":
                return  # W&B refuses it offline
            try:
                run.use_artifact(f"{item.label}:{item.alias}")
            except (ValueError, self._wandb.errors.CommError):  # logged by nobody: made elsewhere, or data
                run.use_artifact(self._describe(item), aliases=[item.alias])

        self._record(lambda run: bounded(lambda: take(run), self.timeout_s))

    def leave(self, item: Artifact) -> None:
        """Log an item that the run made, its files where they are few enough."""
        made = replace(item, metadata={**item.metadata, "inputs": dict(self._inputs)})
        size_mb = sum(file.stat().st_size for file in item.contents.values()) / 1e6
        kept = size_mb <= self.max_artifact_mb
        if not kept:
            most = f"logger.max_artifact_mb={self.max_artifact_mb:g}"
            print(f"{item.label} has {size_mb:.0f} MB, more than {most}: W&B gets its description alone.")

        def leave(run: Any) -> None:
            run.log_artifact(self._describe(made, files=kept), aliases=["latest", item.alias])

        self._record(lambda run: bounded(lambda: leave(run), self.timeout_s))
        self.summarise({f"{item.type}_sha256": item.digest})  # by which an evaluation knows that it is of these weights

    def _describe(self, item: Artifact, *, files: bool = False) -> Any:
        """A W&B artifact; its description is a file too, since artifacts without a file are all alike to W&B."""
        metadata = {"sha256": item.digest, **item.metadata}
        artifact = self._wandb.Artifact(item.label, item.type, metadata=metadata)
        described = self.folder / "lineage" / f"{item.label}.json"
        described.parent.mkdir(exist_ok=True)
        content = json.dumps({"type": item.type, "name": item.name, **metadata}, indent=2)
        described.write_text(f"{content}\n", encoding="utf-8")
        # immutable: uploaded from where they are, instead of copied to W&B's folder in the user's home first
        artifact.add_file(str(described.resolve()), policy="immutable")
        for name, file in item.contents.items() if files else ():
            artifact.add_file(str(file.resolve()), name=name, policy="immutable")
        return artifact

    def finish(self) -> None:
        """Close the run, and wait for what is still to be uploaded no longer than `finish_timeout_s`."""
        try:
            if self.run is not None:
                self.run.finish()
        except Exception as error:
            self._tell(error)


def known_id(folder: Path) -> str | None:
    """The id of the W&B run that a run folder was last recorded in; it names folders and addresses.

    Raises:
        UserError: the file holds something else.
    """
    file = folder / ID_FILE
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text):
        raise UserError(f"{file} must hold the id of a W&B run, not {text[:60]!r}. Delete it to begin a new record.")
    return text


def track_report(
    folder: Path,
    config: Mapping[str, Any],
    *,
    name: str,
    values: Mapping[str, Any],
    pictures: Mapping[str, Image.Image],
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[Any]]]] | None = None,
    made_from: Sequence[Artifact] = (),
    files: Sequence[Path] = (),
) -> WandbRun:
    """A tool's figures as the summary of a W&B run of its own, with its pictures by title and its files as an artifact.

    Args:
        folder: Of the report, made where it is missing. Not the folder of a training run: that keeps the id of its own.
        config: The tool's, with its group `logger`.
        values: Numbers, texts, truths and lists of these, those inside a mapping as `a.b`; lists of mappings are left
            out.
        tables: Columns and rows by title.
        made_from: What was evaluated.
        files: The report's own; of none there is no artifact.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tracker = WandbRun(folder, config, name=name, **{key: config["logger"][key] for key in OPTIONS})
    flat = {key: value for key, value in flatten(values).items() if value is not None}
    figures = {key: value for key, value in flat.items() if not re.search(r"(^|\.)\d+\.", key)}  # as in a.0.b
    tracker.summarise(figures)
    for title, (columns, rows) in (tables or {}).items():
        tracker.log_table(title, columns, rows, 0)
    for title, picture in pictures.items():
        tracker.log_images(title, [picture], [name.rpartition("/")[2]], 0)
    for item in made_from:
        tracker.take(item)
    if files:
        of = {f"{item.type}_sha256": item.digest for item in made_from}
        evaluated = name.removeprefix("evaluation/")
        tracker.leave(Artifact("evaluation", evaluated, sha256(files), {**of, **figures}, tuple(files)))
    tracker.finish()
    return tracker


def finish_open_run() -> None:
    """Close the run that a training left open which failed, or a next one in the same process would log into it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        with contextlib.suppress(Exception):
            bounded(lambda: wandb.run.finish(exit_code=1), OFFLINE_TIMEOUT_S)
