"""Runs compared through W&B: read from its server, and reported there."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.errors import UserError
from ldm.runtime import shell
from ldm.tracking.run import TRAINING_ID, track_report
from ldm.tracking.server import bounded, has_key

LOOK_UP_S, HISTORY_S = 60.0, 600.0
"""The most that the server is waited for: until it names a run, and until all of its history is here."""


def fetch_run(path: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """A training's run from W&B's server, with what tools/evaluate.py logged of it last.

    Args:
        path: `entity/project/run`, the last being the run's id.

    Returns:
        Its flat config, its summary, the summary of its evaluation and its history, row by row.

    Raises:
        UserError: no login here, no such run, or no answer in time.
    """
    import wandb

    def look_up() -> tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]:
        api = wandb.Api()
        run = api.run(path)
        evaluations = api.runs(path.rpartition("/")[0], filters={f"config.{TRAINING_ID}": run.id})
        newest = max(evaluations, key=lambda other: other.created_at, default=None)
        evaluation = {} if newest is None else dict(newest.summary_metrics)
        return run, dict(run.config), dict(run.summary_metrics), evaluation

    if not has_key():
        raise UserError(
            f"{path} is no run folder here, and to look for it in W&B there is no login: `wandb login`, or set "
            "WANDB_API_KEY."
        )
    try:
        run, config, summary, evaluation = bounded(look_up, LOOK_UP_S)
        return config, summary, evaluation, bounded(lambda: list(run.scan_history()), HISTORY_S)
    except (wandb.Error, ValueError, OSError) as error:
        raise UserError(
            f"{path} is no run folder here, and W&B gave no run of that path (entity/project/run): {error}"
        ) from error


def track_comparison(
    folder: Path,
    config: Mapping[str, Any],
    *,
    name: str,
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]],
    pictures: Mapping[str, Image.Image],
    markdown: str,
    curves: Sequence[str],
    compared: Sequence[str],
) -> str:
    """A comparison as a W&B run of its own, and as a W&B report where one can be made.

    Args:
        folder, config, tables, pictures: As `track_report` takes them.
        markdown: The text of the report.
        curves: Names of what the report plots by step.
        compared: Names of the W&B runs that it plots, `<stage>/<name>`.

    Returns:
        A line that says where the report is, or what is missing for one.
    """
    tracker = track_report(folder, config, name=name, values={}, pictures=pictures, tables=tables)
    if tracker.mode != "online":
        return "No W&B report: this run is offline. It needs a login (`wandb login`)."
    try:
        import wandb_workspaces.reports.v2 as reports
    except ImportError:
        return f"No W&B report: its package is not installed: {shell.install_command('reports')}"
    where = {"project": config["logger"]["project"], "entity": tracker.run.entity}

    def save() -> str:
        runs = reports.Runset(**where, name="compared", filters=f"Metric('Name') in {list(compared)}")
        panels = [reports.LinePlot(title=curve, x="step", y=[curve]) for curve in curves]
        blocks = [reports.MarkdownBlock(text=markdown), reports.PanelGrid(runsets=[runs], panels=panels)]
        report = reports.Report(**where, title=name[:128], blocks=blocks)
        report.save()
        return report.url

    try:
        return f"W&B report: {bounded(save, config['logger']['timeout_s'])}"
    except Exception as error:  # the package raises plain ones; what was found is written and logged already
        return f"No W&B report: {error}"
