"""W&B behind one small face: a run that logs numbers and pictures and never asks or waits for anything."""

import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.errors import UserError

ID_FILE = "wandb_id.txt"


def choose_mode(requested: str | None) -> str:
    """`online` only where an API key is at hand; W&B would otherwise ask for one on the terminal."""
    if requested:
        return requested
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    import wandb

    return "online" if wandb.login(prompt=False) else "offline"


class WandbRun:
    """One run in W&B, its id kept in the run folder so that a resumed run continues it."""

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
    ) -> None:
        import wandb

        self._wandb = wandb
        id_file = folder / ID_FILE
        run_id = id_file.read_text().strip() if resume and id_file.is_file() else uuid.uuid4().hex[:8]
        self.mode = choose_mode(mode)
        self.run = wandb.init(
            dir=folder,
            project=project,
            entity=entity,
            name=name,
            group=group,
            tags=list(tags),
            id=run_id,
            config=flatten(config),
            mode=self.mode,  # type: ignore[arg-type]
            resume="allow" if self.mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
        # an axis of our own: W&B drops what comes with a smaller step than the last, as after a validation or a resume
        self.run.define_metric("*", step_metric="step")
        id_file.write_text(run_id + "\n")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log({**metrics, "step": step})

    def log_images(self, key: str, images: Sequence[Image.Image], captions: Sequence[str | None], step: int) -> None:
        """One panel of pictures with captions."""
        panel = [self._wandb.Image(image, caption=caption) for image, caption in zip(images, captions, strict=True)]
        self.run.log({key: panel, "step": step})

    def summarise(self, values: Mapping[str, Any]) -> None:
        self.run.summary.update(dict(values))

    def finish(self) -> None:
        self.run.finish()


def track_report(
    folder: Path,
    config: Mapping[str, Any],
    *,
    name: str,
    values: Mapping[str, Any],
    pictures: Mapping[str, Image.Image],
) -> None:
    """A tool's figures as the summary of a W&B run of its own, with its pictures by title.

    Args:
        folder: Of the report, made where it is missing. Not the folder of a training run: that keeps the id of its own.
        config: The tool's, with its group `logger`.
        values: Those that are no number, text or truth are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = {key: config["logger"][key] for key in ("project", "entity", "group", "tags", "mode")}
    tracker = WandbRun(folder, config, name=name, **options)
    tracker.summarise({key: value for key, value in values.items() if isinstance(value, int | float | str)})
    for title, picture in pictures.items():
        tracker.log_images(title, [picture], [name.rpartition("/")[2]], 0)
    tracker.finish()


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested config -> `a.b.c` keys with plain values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def finish_open_run() -> None:
    """Close the run that a training left open which failed, or a next one in the same process would log into it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.run.finish(exit_code=1)


def fetch_run(path: str) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """A training's run from W&B's server, with what tools/evaluate.py logged of it.

    The evaluation is a run of its own, named after the training's: the newest before another training of that name.

    Args:
        path: `entity/project/run`, the last being the run's id.

    Returns:
        Its flat config, its summary and its history, row by row. Config and summary of the evaluation stand among them
        under `evaluation.`.

    Raises:
        UserError: no login here, or no such run.
    """
    import wandb

    if not wandb.login(prompt=False):
        raise UserError(
            f"{path} is no run folder here, and to look for it in W&B there is no login: `wandb login`, or set "
            "WANDB_API_KEY."
        )
    try:
        api = wandb.Api()
        run = api.run(path)
        project = path.rpartition("/")[0]
        trainings = api.runs(project, filters={"display_name": run.name})
        end = min((other.created_at for other in trainings if other.created_at > run.created_at), default=None)
        evaluations = [
            other
            for other in api.runs(project, filters={"display_name": f"evaluation/{run.name}"})
            if other.created_at > run.created_at and (end is None or other.created_at < end)
        ]
        config, summary = dict(run.config), dict(run.summary_metrics)
        if evaluations:
            newest = max(evaluations, key=lambda other: other.created_at)
            config |= {f"evaluation.{key}": value for key, value in newest.config.items()}
            summary |= {f"evaluation.{key}": value for key, value in newest.summary_metrics.items()}
        return config, summary, list(run.scan_history())
    except (wandb.Error, ValueError, OSError) as error:
        raise UserError(
            f"{path} is no run folder here, and W&B gave no run of that path (entity/project/run): {error}"
        ) from error


def track_comparison(
    folder: Path,
    config: Mapping[str, Any],
    *,
    name: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    pictures: Mapping[str, Image.Image],
    markdown: str,
    curves: Sequence[str],
    compared: Sequence[str],
) -> str:
    """A comparison as a W&B run of its own, and as a W&B report where one can be made.

    Args:
        folder, config, pictures: As `track_report` takes them.
        columns, rows: Of its table.
        markdown: The text of the report.
        curves: Names of what the report plots by step.
        compared: Names of the W&B runs that it plots, `<stage>/<name>`.

    Returns:
        A line that says where the report is, or what is missing for one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = {key: config["logger"][key] for key in ("project", "entity", "group", "tags", "mode")}
    tracker = WandbRun(folder, config, name=name, **options)
    table = tracker._wandb.Table(columns=list(columns), data=[list(row) for row in rows])
    tracker.run.log({"comparison": table, "step": 0})
    for title, picture in pictures.items():
        tracker.log_images(title, [picture], [name.rpartition("/")[2]], 0)
    online, entity = tracker.mode == "online", tracker.run.entity
    tracker.finish()
    if not online:
        return "No W&B report: this run is offline. It needs a login (`wandb login`)."
    try:
        import wandb_workspaces.reports.v2 as reports
    except ImportError:
        return 'No W&B report: its package is not installed: pip install "ldm[reports]"'
    where = {"project": options["project"], "entity": entity}
    runs = reports.Runset(**where, name="compared", filters=f"Metric('Name') in {list(compared)}")
    panels = [reports.LinePlot(title=curve, x="step", y=[curve]) for curve in curves]
    blocks = [reports.MarkdownBlock(text=markdown), reports.PanelGrid(runsets=[runs], panels=panels)]
    try:
        report = reports.Report(**where, title=name[:128], blocks=blocks)
        report.save()
    except Exception as error:  # the package raises plain ones; what was found is written and logged already
        return f"No W&B report: {error}"
    return f"W&B report: {report.url}"
