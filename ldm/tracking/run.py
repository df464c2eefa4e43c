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
from ldm.tracking.server import MODES, bounded, choose_mode, has_key

ID_FILE = "wandb_id.txt"
TRAINING_ID = "training_id"
"""Key in the config of a tool's run: the id of the training that it is of."""
OPTIONS = ("project", "entity", "group", "tags", "mode", "timeout_s", "finish_timeout_s", "max_artifact_mb")
"""What is read of the config group `logger` for any run."""
OFFLINE_TIMEOUT_S = 30.0
"""For W&B's own process to start; there is no server to wait for."""
PLAIN: dict[str, Any] = {"project": "ldm", "entity": None, "group": None, "tags": []}
"""What a run is recorded under where W&B rejects what was asked for."""


class WandbRun:
    """One run in W&B, its id kept in the run folder so that a resumed run continues it. Nothing that W&B raises passes.

    Args:
        timeout_s: The most that the start and each artifact wait for the server.
        finish_timeout_s: The most that the end waits for what is still to be uploaded.
        max_artifact_mb: Of larger artifacts the description alone is logged.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        project: str,
        entity: str | None = None,
        name: str,
        group: str | None = None,
        tags: Sequence[str] = (),
        mode: str | None = None,
        resume: bool = False,
        timeout_s: float = 30.0,
        finish_timeout_s: float = 300.0,
        max_artifact_mb: float = 1000.0,
    ) -> None:
        # their telemetry would hold up the end of the process for 20 s where the server does not answer
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self.folder, self.timeout_s, self.max_artifact_mb = folder, timeout_s, max_artifact_mb
        self.finish_timeout_s = finish_timeout_s
        self._options: dict[str, Any] = {
            "dir": folder,
            "project": project,
            "entity": entity,
            "name": name,
            "group": group,
            "job_type": name.partition("/")[0],
            "tags": tags,
            "config": flatten(config),
        }
        self._wandb: Any = None
        self.run: Any = None
        """W&B's own; None where it takes no run at all."""
        self._row, self._records, self._inputs = -1, list[str](), dict[str, str]()
        known: str | None = None
        try:
            known = known_id(folder) if resume else None
        except (UserError, OSError) as error:
            print(f"warning: {error}", flush=True)
        self._options["id"] = known or uuid.uuid4().hex[:8]
        self.mode = MODES[0]
        try:
            import wandb

            self._wandb = wandb
            self.mode = choose_mode(mode)
            self._start(resume=known is not None)
        except Exception as error:  # of a server, a setting, a variable, an installation
            attempts: list[tuple[str, Mapping[str, Any]]] = [("offline", {}), ("offline", PLAIN)]
            self._fall_back(error, attempts[self.mode != "online" :], resume=known is not None)
        with contextlib.suppress(OSError):
            write_text(folder / ID_FILE, f"{self._options['id']}\n")

    @property
    def id(self) -> str:
        """The W&B run id."""
        return self._options["id"]

    def _start(self, *, resume: bool) -> None:
        if self.mode == "online" and not has_key():
            raise UserError("logger.mode=online, but no API key was found")
        settings = self._wandb.Settings(
            silent=True,
            console="off",
            init_timeout=self.timeout_s if self.mode == "online" else OFFLINE_TIMEOUT_S,
            finish_timeout=self.finish_timeout_s,
            finish_timeout_raises=True,
        )
        tags = list(self._options["tags"])
        # marked in the record as well where it is offline: an upload then appends instead of beginning anew
        options = {**self._options, "tags": tags, "mode": self.mode, "resume": "allow" if resume else None}
        self.run = self._wandb.init(**options, settings=settings)
        if self.mode != "disabled":
            self._options["id"] = self.run.id  # an agent of a sweep gives it another one than we asked for
        # an axis of our own: W&B drops what comes with a smaller step than the last, as after a validation or a resume
        self.run.define_metric("*", step_metric="step")
        self._row = max(self._row, self.run.step - 1)
        if self.mode != "disabled":
            self._records.append(str(self.run.settings.sync_dir))

    def _fall_back(
        self, error: BaseException, attempts: Sequence[tuple[str, Mapping[str, Any]]], *, resume: bool = True
    ) -> None:
        """Start the run again in the first of these ways that works, else go on without a record; say so in one line.

        Args:
            attempts: Modes, with what takes the place of our settings.
        """
        # its process holds on to the run's id, or is dead; the run's own threads end with `finish`
        ends = [self.run.finish] if self.run is not None else []
        for end in ends + ([self._wandb.teardown] if self._wandb is not None else []):
            with contextlib.suppress(Exception):
                bounded(end, self.timeout_s)
        self.run = None
        for mode, settings in attempts:
            self.mode = mode
            self._options |= settings
            try:
                self._start(resume=resume)
                self._tell(error, rejected=bool(settings))
                return
            except Exception:  # a folder that cannot be written, say: the next attempt needs less
                continue
        self.mode = "disabled"
        self._tell(error)

    def _tell(self, error: BaseException, *, rejected: bool = False) -> None:
        said, _, _ = " ".join(str(error).split()).partition(" Consider increasing")  # their advice, not our option
        reason = said[:300] or type(error).__name__
        what = "rejects a setting" if rejected else "is not available"
        message = f"W&B {what} ({reason}). Continuing without a record."
        if self._records and self.mode != "disabled":
            under = f", in project {PLAIN['project']} without entity, group and tags" if rejected else ""
            upload = shell.python("-m", "wandb", "sync", "--include-online", *self._records)
            message = f"W&B {what} ({reason}). Continuing; its record is on disk{under}. To upload it later: {upload}"
        print(message, flush=True)

    def _record(self, call: Callable[[Any], Any]) -> None:
        """`call` with the run; again with the one that takes its place where W&B fails."""
        for _ in MODES:
            if self.run is None:
                return
            try:
                call(self.run)
                return
            except Exception as error:
                if self.mode not in MODES[:2]:
                    return
                self._fall_back(error, [(mode, {}) for mode in MODES[MODES.index(self.mode) + 1 :]])

    def _log(self, values: Callable[[], Mapping[str, Any]], step: int) -> None:
        # W&B's own count follows the steps, so that a resumed run's record goes on where the last one ended
        self._row = max(self._row + 1, step)
        row = self._row
        self._record(lambda run: run.log({**values(), "step": step}, step=row, commit=True))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._log(lambda: metrics, step)

    def log_images(self, key: str, images: Sequence[Image.Image], captions: Sequence[str | None], step: int) -> None:
        """A panel of pictures with captions; of several a table too, to sort, filter and compare runs by."""
        pairs = list(zip(images, captions, strict=True))

        def logged() -> dict[str, Any]:
            panel = {key: [self._wandb.Image(image, caption=caption) for image, caption in pairs]}
            if len(pairs) == 1:
                return panel
            rows = [[step, caption, self._wandb.Image(image)] for image, caption in pairs]
            return panel | {f"{key}_table": self._wandb.Table(columns=["step", "caption", "image"], data=rows)}

        self._log(logged, step)

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """A table of texts and numbers."""
        data = [list(row) for row in rows]
        self._log(lambda: {key: self._wandb.Table(columns=list(columns), data=data)}, step)

    def configure(self, values: Mapping[str, Any]) -> None:
        """Add to the config."""
        flat = flatten(values)
        self._options["config"] |= flat
        self._record(lambda run: run.config.update(flat, allow_val_change=True))

    def summarise(self, values: Mapping[str, Any]) -> None:
        self._record(lambda run: run.summary.update(dict(values)))

    def take(self, item: Artifact) -> None:
        """Say that the run was made from an item: in the config by its digest, and online as an edge of the lineage."""
        self._inputs[item.label] = item.digest
        self.configure({"inputs": {item.label: item.digest}})

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
        aliases = ["latest", item.alias]

        def leave(run: Any) -> None:
            run.log_artifact(self._describe(made, files=kept), aliases=aliases)

        made = replace(item, metadata={**item.metadata, "inputs": dict(self._inputs)})
        kept = item.num_bytes <= 1e6 * self.max_artifact_mb
        if not kept:
            print(
                f"{item.label} has {item.num_bytes / 1e6:.0f} MB, more than logger.max_artifact_mb="
                f"{self.max_artifact_mb:g}: W&B gets its description alone.",
                flush=True,
            )
        self._record(lambda run: bounded(lambda: leave(run), self.timeout_s))
        self.summarise({f"{item.type}_sha256": item.digest})  # by which an evaluation knows that it is of these weights

    def _describe(self, item: Artifact, *, files: bool = False) -> Any:
        """A W&B artifact; its description is a file too, since artifacts without a file are all alike to W&B."""
        metadata = {"sha256": item.digest, **item.metadata}
        artifact = self._wandb.Artifact(item.label, item.type, metadata=metadata)
        described = self.folder / "lineage" / f"{item.label}.json"
        described.parent.mkdir(exist_ok=True)
        content = {"type": item.type, "name": item.name, **metadata}
        described.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        # immutable: uploaded from where they are, instead of copied to W&B's folder in the user's home first
        artifact.add_file(str(described.resolve()), policy="immutable")
        for name, file in item.contents.items() if files else ():
            artifact.add_file(str(file.resolve()), name=name, policy="immutable")
        return artifact

    def finish(self) -> None:
        """Close the run, and wait for what is still to be uploaded no longer than `finish_timeout_s`."""
        if self.run is None:
            return
        try:
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
        raise UserError(
            f"{file} must hold the id of a W&B run, of letters, digits, - and _, not {text[:60]!r}. Delete it: what "
            "follows is then recorded as a run of its own."
        )
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
) -> None:
    """A tool's figures as the summary of a W&B run of its own, with its pictures by title and its files as an artifact.

    Args:
        folder: Of the report, made where it is missing. Not the folder of a training run: that keeps the id of its own.
        config: The tool's, with its group `logger`.
        values: Numbers, texts, truths and lists of these, those inside a mapping as `a.b`; what else there is, is left
            out.
        tables: Columns and rows by title.
        made_from: What was evaluated.
        files: The report's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = {key: config["logger"][key] for key in OPTIONS}
    tracker = WandbRun(folder, config, name=name, **options)
    figures = {key: value for key, value in flatten(_without_lists_of_mappings(values)).items() if value is not None}
    tracker.summarise(figures)
    for title, (columns, rows) in (tables or {}).items():
        tracker.log_table(title, columns, rows, 0)
    for title, picture in pictures.items():
        tracker.log_images(title, [picture], [name.rpartition("/")[2]], 0)
    for item in made_from:
        tracker.take(item)
    of = {f"{item.type}_sha256": item.digest for item in made_from}
    digest = sha256([*files] or json.dumps(figures, sort_keys=True))
    tracker.leave(Artifact("evaluation", name.removeprefix("evaluation/"), digest, {**of, **figures}, tuple(files)))
    tracker.finish()


def _without_lists_of_mappings(values: Mapping[str, Any]) -> dict[str, Any]:
    def is_table(value: Any) -> bool:
        return isinstance(value, list | tuple) and any(isinstance(inner, Mapping) for inner in value)

    return {
        key: _without_lists_of_mappings(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if not is_table(value)
    }


def finish_open_run() -> None:
    """Close the run that a training left open which failed, or a next one in the same process would log into it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        with contextlib.suppress(Exception):
            bounded(lambda: wandb.run.finish(exit_code=1), OFFLINE_TIMEOUT_S)
