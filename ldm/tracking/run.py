"""Logging of metrics, images and lineage to W&B, without prompts, long waits or exceptions.

Training never fails because of W&B. If the server cannot be reached, the run continues offline under the same id,
and the command that uploads it later is printed.
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
from ldm.tracking.server import choose_mode, has_key, with_timeout

ID_FILE = "wandb_id.txt"
TRAINING_ID = "training_id"
"""Config key of an evaluation's W&B run that stores the id of the evaluated training run."""
OFFLINE_TIMEOUT_S = 30.0
"""Timeout for starting W&B's own process in offline mode, without a server."""
FALLBACKS: dict[str, Any] = {"project": "ldm", "entity": None, "group": None, "tags": []}
"""Options to use if W&B rejects the user's options."""
DEFAULTS = FALLBACKS | {"mode": None, "timeout_s": 30.0, "finish_timeout_s": 300.0, "max_artifact_mb": 1000.0}
OPTIONS = tuple(DEFAULTS)
"""Keys of the config group `logger` that `WandbRun` uses."""


class WandbRun:
    """A W&B run that never raises an error.

    The id is stored in the run folder, so that a resumed training run continues the same W&B run.

    Args:
        folder: Run folder.
        config: Config to log, nested.
        name: Name of the run in W&B, `<type>/<name>`.
        resume: True to continue the W&B run whose id is in the folder.
        options: Overrides of DEFAULTS. `timeout_s` applies to starting the run and to each artifact, and
            `finish_timeout_s` to the upload at the end. Artifacts larger than `max_artifact_mb` are logged without
            files.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], *, name: str, resume: bool = False, **options: Any
    ) -> None:
        # otherwise, if the server does not answer, W&B's error reporting delays the exit by 20 s
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        options = DEFAULTS | options
        self.folder, self.timeout_s = folder, options["timeout_s"]
        self.finish_timeout_s, self.max_artifact_mb = options["finish_timeout_s"], options["max_artifact_mb"]
        saved_id: str | None = None
        try:
            saved_id = read_run_id(folder) if resume else None
        except (UserError, OSError) as error:
            print(f"warning: {error}", flush=True)
        requested = {key: options[key] for key in FALLBACKS}
        identity = {"id": saved_id or uuid.uuid4().hex[:8], "name": name, "job_type": name.partition("/")[0]}
        self._options: dict[str, Any] = {"dir": folder, **identity, **requested, "config": flatten(config)}
        self._wandb: Any = None
        self.run: Any = None
        """The run object of the wandb package; None if W&B is disabled or could not be started."""
        self._row, self._sync_dirs, self._inputs = -1, list[str](), dict[str, str]()
        self._should_append = saved_id is not None
        self._start_with_fallbacks([(options["mode"], {}), ("offline", {}), ("offline", FALLBACKS)])
        with contextlib.suppress(OSError):
            write_text(folder / ID_FILE, f"{self._options['id']}\n")

    def _start_with_fallbacks(
        self, attempts: Sequence[tuple[str | None, Mapping[str, Any]]], error: Exception | None = None
    ) -> None:
        """Start W&B with the first settings that work, else continue without W&B. Print a message after an error.

        Args:
            attempts: Modes, each with overrides of the run's options.
            error: Error that made a restart necessary, if any.
        """
        overrides: Mapping[str, Any] = {}
        for mode, overrides in attempts:
            self._options |= overrides
            try:
                self._start(mode)
                break
            except Exception as failure:  # from the server, a setting, an environment variable or the installation
                error = error or failure
                self._stop()
        else:
            self.mode = "disabled"
        if error is not None:
            self._warn(error, rejected=bool(overrides))

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
        # also set offline, so that a later upload appends to the run instead of replacing it
        resume = "allow" if self._should_append else None
        options = {**self._options, "tags": list(self._options["tags"]), "mode": self.mode, "resume": resume}
        self.run = wandb.init(**options, settings=settings)
        self._options["id"] = self.run.id  # a sweep agent assigns its own id
        # our own x axis: W&B drops values whose step decreases, as happens at validation and after a resume
        self.run.define_metric("*", step_metric="step")
        self._row = max(self._row, self.run.step - 1)
        self._sync_dirs.append(str(self.run.settings.sync_dir))

    def _stop(self) -> None:
        """Stop the threads of the run and W&B's process, so that the run's id can be used again."""
        run, wandb = self.run, self._wandb
        for close in (lambda: run.finish(), lambda: wandb.teardown()):
            with contextlib.suppress(Exception):
                with_timeout(close, self.timeout_s)
        self.run = None

    def _warn(self, error: Exception, *, rejected: bool = False) -> None:
        # remove W&B's hint about a setting that is not one of our options
        reason, _, _ = " ".join(str(error).split()).partition(" Consider increasing")
        consequence = "Continuing without W&B."
        if self._sync_dirs and self.mode != "disabled":
            target = f", for project {FALLBACKS['project']} without entity, group or tags" if rejected else ""
            upload = shell.python("-m", "wandb", "sync", "--include-online", *self._sync_dirs)
            consequence = f"Continuing; logs are saved on disk{target}. To upload them later: {upload}"
        problem = "rejected a setting" if rejected else "is not available"
        print(f"W&B {problem} ({reason[:300] or type(error).__name__}). {consequence}", flush=True)

    def _record(self, call: Callable[[Any], Any]) -> None:
        """Run `call` on the W&B run. If W&B fails, switch to an offline run and repeat the call."""
        while self.run is not None:
            try:
                call(self.run)
                return
            except Exception as error:
                self._stop()
                self._should_append = True
                self._start_with_fallbacks([("offline", {})] if self.mode == "online" else [], error)

    def _log(self, values: Callable[[], Mapping[str, Any]], step: int) -> None:
        # W&B's internal step follows ours, so that a resumed run continues after the last row
        self._row = max(self._row + 1, step)
        row = self._row
        self._record(lambda run: run.log({**values(), "step": step}, step=row, commit=True))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._log(lambda: metrics, step)

    def log_images(self, key: str, images: Sequence[Image.Image], captions: Sequence[str | None], step: int) -> None:
        """Log a panel of images with captions."""
        pairs = list(zip(images, captions, strict=True))
        self._log(lambda: {key: [self._wandb.Image(image, caption=caption) for image, caption in pairs]}, step)

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Log a table of text and numbers."""
        self._log(lambda: {key: self._wandb.Table(columns=list(columns), data=list(map(list, rows)))}, step)

    def log_summary(self, values: Mapping[str, Any]) -> None:
        self._record(lambda run: run.summary.update(dict(values)))

    def use_artifact(self, item: Artifact) -> None:
        """Record an input of the run: its digest in the config and, if online, an edge in the lineage graph."""
        self._inputs[item.label] = item.digest
        inputs = {f"inputs.{item.label}": item.digest}
        self._options["config"] |= inputs
        self._record(lambda run: run.config.update(inputs, allow_val_change=True))

        def use_artifact(run: Any) -> None:
            if self.mode != "online":
                return  # not supported by W&B offline
            try:
                run.use_artifact(f"{item.label}:{item.alias}")
            except (ValueError, self._wandb.errors.CommError):  # no W&B run has logged this artifact
                run.use_artifact(self._describe(item), aliases=[item.alias])

        self._record(lambda run: with_timeout(lambda: use_artifact(run), self.timeout_s))

    def log_artifact(self, item: Artifact) -> None:
        """Log an output of the run, with its files unless they exceed `max_artifact_mb`."""
        output = replace(item, metadata={**item.metadata, "inputs": dict(self._inputs)})
        size_mb = sum(file.stat().st_size for file in item.contents.values()) / 1e6
        with_files = size_mb <= self.max_artifact_mb
        if not with_files:
            limit = f"logger.max_artifact_mb={self.max_artifact_mb:g}"
            print(f"{item.label} is {size_mb:.0f} MB, more than {limit}. Only its description is logged to W&B.")

        def log_artifact(run: Any) -> None:
            run.log_artifact(self._describe(output, files=with_files), aliases=["latest", item.alias])

        self._record(lambda run: with_timeout(lambda: log_artifact(run), self.timeout_s))
        self.log_summary({f"{item.type}_sha256": item.digest})  # identifies these weights in later evaluations

    def _describe(self, item: Artifact, *, files: bool = False) -> Any:
        """Create a W&B artifact. It always has a description file, because W&B treats all empty artifacts as equal."""
        metadata = {"sha256": item.digest, **item.metadata}
        artifact = self._wandb.Artifact(item.label, item.type, metadata=metadata)
        description = self.folder / "lineage" / f"{item.label}.json"
        description.parent.mkdir(exist_ok=True)
        content = json.dumps({"type": item.type, "name": item.name, **metadata}, indent=2)
        description.write_text(f"{content}\n", encoding="utf-8")
        # immutable: upload the original file, instead of a copy in W&B's folder in the user's home
        artifact.add_file(str(description.resolve()), policy="immutable")
        for name, file in item.contents.items() if files else ():
            artifact.add_file(str(file.resolve()), name=name, policy="immutable")
        return artifact

    def finish(self) -> None:
        """Close the run, waiting at most `finish_timeout_s` for remaining uploads."""
        try:
            if self.run is not None:
                self.run.finish()
        except Exception as error:
            self._warn(error)


def read_run_id(folder: Path) -> str | None:
    """Return the id of the latest W&B run of a run folder; None if there is none.

    The id is validated, because it is used in paths and URLs.

    Raises:
        UserError: if the file does not contain a valid id.
    """
    file = folder / ID_FILE
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text):
        raise UserError(
            f"{file} must contain the id of a W&B run, not {text[:60]!r}. Delete the file to start a new W&B run."
        )
    return text


def track_report(
    folder: Path,
    config: Mapping[str, Any],
    *,
    name: str,
    values: Mapping[str, Any],
    figures: Mapping[str, Image.Image],
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[Any]]]] | None = None,
    inputs: Sequence[Artifact] = (),
    files: Sequence[Path] = (),
) -> WandbRun:
    """Log the results of a tool to a separate W&B run: metrics as its summary, figures, tables and files.

    Args:
        folder: Folder for W&B's files, created if missing. Must not be the folder of a training run, which stores
            the id of its own W&B run.
        config: Config of the tool, including its group `logger`.
        name: Name of the run in W&B.
        values: Numbers, strings, booleans and lists of these. Nested mappings are flattened to keys like `a.b`. Lists
            of mappings are not logged.
        figures: Figures by title.
        tables: Columns and rows by title.
        inputs: Artifacts that were evaluated.
        files: Report files to log as an artifact; if empty, no artifact is logged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tracker = WandbRun(folder, config, name=name, **{key: config["logger"][key] for key in OPTIONS})
    flat = {key: value for key, value in flatten(values).items() if value is not None}
    summary = {key: value for key, value in flat.items() if not re.search(r"(^|\.)\d+\.", key)}  # as in a.0.b
    tracker.log_summary(summary)
    for title, (columns, rows) in (tables or {}).items():
        tracker.log_table(title, columns, rows, 0)
    for title, figure in figures.items():
        tracker.log_images(title, [figure], [name.rpartition("/")[2]], 0)
    for item in inputs:
        tracker.use_artifact(item)
    if files:
        digests = {f"{item.type}_sha256": item.digest for item in inputs}
        run_name = name.removeprefix("evaluation/")
        tracker.log_artifact(Artifact("evaluation", run_name, sha256(files), {**digests, **summary}, tuple(files)))
    tracker.finish()
    return tracker


def finish_open_run() -> None:
    """Close the W&B run of a failed training run, so that the next run in this process does not log to it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        with contextlib.suppress(Exception):
            with_timeout(lambda: wandb.run.finish(exit_code=1), OFFLINE_TIMEOUT_S)
