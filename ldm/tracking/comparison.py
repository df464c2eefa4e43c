"""Comparing runs with W&B: fetching runs from the server, and publishing a comparison as a W&B report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.errors import UserError
from ldm.runtime import shell
from ldm.tracking.run import TRAINING_ID, track_report
from ldm.tracking.server import has_key, with_timeout

LOOKUP_TIMEOUT_S, HISTORY_TIMEOUT_S = 60.0, 600.0
"""Timeouts in seconds for finding a run and for downloading its history."""


def fetch_run(path: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Fetch a training run from W&B's server, with its latest evaluation by tools/evaluate.py.

    Args:
        path: `entity/project/run`, where the last part is the id of the run.

    Returns:
        The flat config, the summary, the summary of the evaluation, and the rows of the history.

    Raises:
        UserError: if the user is not logged in, the run does not exist, or the server does not answer in time.
    """
    import wandb

    def look_up() -> tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]:
        api = wandb.Api()
        run = api.run(path)
        evaluations = api.runs(path.rpartition("/")[0], filters={f"config.{TRAINING_ID}": run.id})
        newest_run = max(evaluations, key=lambda entry: entry.created_at, default=None)
        evaluation = {} if newest_run is None else dict(newest_run.summary_metrics)
        return run, dict(run.config), dict(run.summary_metrics), evaluation

    if not has_key():
        raise UserError(
            f"{path} is not a run folder. To search for it in W&B, log in with `wandb login` or set WANDB_API_KEY."
        )
    try:
        run, config, summary, evaluation = with_timeout(look_up, LOOKUP_TIMEOUT_S)
        return config, summary, evaluation, with_timeout(lambda: list(run.scan_history()), HISTORY_TIMEOUT_S)
    except (wandb.Error, ValueError, OSError) as error:
        raise UserError(
            f"{path} is not a run folder, and fetching it from W&B as entity/project/run failed: {error}"
        ) from error


def track_comparison(
    folder: Path,
    config: Mapping[str, Any],
    *,
    name: str,
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]],
    figures: Mapping[str, Image.Image],
    markdown: str,
    curves: Sequence[str],
    run_names: Sequence[str],
) -> str:
    """Log a comparison to a separate W&B run, and publish it as a W&B report if possible.

    Args:
        folder, config, name, tables, figures: See `track_report`.
        markdown: Text of the W&B report.
        curves: Names of metrics to plot over steps.
        run_names: Names of the W&B runs to plot, `<stage>/<name>`.

    Returns:
        A line with the address of the report, or the reason why it was not published.
    """
    tracker = track_report(folder, config, name=name, values={}, figures=figures, tables=tables)
    if tracker.mode != "online":
        return "No W&B report: this run is offline. Log in with `wandb login`."
    try:
        import wandb_workspaces.reports.v2 as reports
    except ImportError:
        return f"No W&B report: its package is not installed. To install it: {shell.install_command('reports')}"
    location = {"project": config["logger"]["project"], "entity": tracker.run.entity}

    def save() -> str:
        runs = reports.Runset(**location, name="compared", filters=f"Metric('Name') in {list(run_names)}")
        panels = [reports.LinePlot(title=curve, x="step", y=[curve]) for curve in curves]
        blocks = [reports.MarkdownBlock(text=markdown), reports.PanelGrid(runsets=[runs], panels=panels)]
        report = reports.Report(**location, title=name[:128], blocks=blocks)
        report.save()
        return report.url

    try:
        return f"W&B report: {with_timeout(save, config['logger']['timeout_s'])}"
    except Exception as error:  # the package raises bare Exceptions; the comparison itself is already saved and logged
        return f"No W&B report: {error}"
