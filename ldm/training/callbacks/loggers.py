"""Loggers for metrics.csv and, unless turned off, for W&B."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import Logger
from PIL import Image

from ldm.files.atomic import write_text
from ldm.latents.cache import latents_folder
from ldm.latents.contract import LatentContract
from ldm.runs.disk import warn_on_write_error
from ldm.runs.lineage import inputs, outputs
from ldm.runs.run import Run
from ldm.tracking.run import OPTIONS, WandbRun


@dataclass
class Loggers:
    """Loggers passed to Lightning, and the W&B run, if any."""

    lightning: list[Logger]
    wandb: WandbRun | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def log_outcome(self, run: Run, metrics: Mapping[str, Any], figure: Path) -> None:
        """Log the final metrics, figure, and input and output artifacts of a finished run to W&B."""
        if self.wandb is None:
            return
        self.wandb.log_summary(metrics)
        with Image.open(figure) as image:
            self.wandb.log_images(figure.stem, [image], [figure.stem], metrics["steps"])
        latents = None
        if run.stage == "vae" and self.options.get("upload_latents"):
            latents = latents_folder(LatentContract.load(run.path), run.config()["data"]["cache_dir"])
        for item in inputs(run):
            self.wandb.use_artifact(item)
        for item in outputs(run, latents):
            self.wandb.log_artifact(item)
        self.wandb.finish()


class CsvLogger(Logger):
    """Writes metrics.csv: one row per call to `log_metrics`, one column per metric. Write errors do not stop training.

    Args:
        last_row: Step of the last existing row to keep.
        tracker: W&B run that receives the same metrics. It stays open after training for the final images and summary.
    """

    name, version = "csv", ""

    def __init__(self, file: Path, last_row: int = -1, tracker: WandbRun | None = None) -> None:
        super().__init__()
        self.file, self.tracker = file, tracker
        self._rows: list[dict[str, Any]] = []
        self._rows_per_write = 100
        self.drop_rows_after(last_row)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing, because the config is in config.yaml and W&B gets the config when the W&B run starts."""

    def drop_rows_after(self, last_step: int) -> None:
        """Drop the rows after `last_step`, because training continues from there and logs them again."""
        self._rows = [row for row in self._rows if row["step"] <= last_step]
        if self.file.is_file():
            self._write(last_step)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._rows.append({**metrics, "step": step or 0})
        if self.tracker is not None:
            self.tracker.log(metrics, step or 0)
        if len(self._rows) >= self._rows_per_write:
            self.save()

    def save(self) -> None:
        if self._rows:
            self._write()

    def _write(self, last_step: float = math.inf) -> None:
        """Rewrite the file with its rows up to `last_step`, followed by the rows not written yet."""
        with warn_on_write_error(self.file):
            columns, rows = _read(self.file)
            rows = [row for row in rows if int(row["step"]) <= last_step] + self._rows
            columns = sorted({"step"}.union(columns, *self._rows))
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_text(self.file, text.getvalue())
            self._rows = []
            self._rows_per_write = max(100, len(rows) // 100)  # keeps the cost of rewriting small in long runs


def _read(file: Path) -> tuple[Sequence[str], list[dict[str, Any]]]:
    """Return the column names and the rows. Rows without a step and a truncated last line are ignored."""
    *lines, _ = (file.read_text(encoding="utf-8", errors="replace") if file.is_file() else "").split("\n")
    table = csv.DictReader(lines, restval="")
    return table.fieldnames or [], [row for row in table if row.get("step", "").isdigit()]


def make_loggers(
    options: Mapping[str, Any], run: Run, *, resume: bool, last_row: int = -1, main_process: bool = True
) -> Loggers:
    """Build the loggers of a run from the config group `logger`. Only the main process has loggers.

    Args:
        resume: True if the run is resumed.
        last_row: Step of the last existing row in metrics.csv to keep.
    """
    if not main_process:
        return Loggers([])
    tracker = None
    if options["wandb"]:
        name = run.facts["name"]
        settings = {key: options[key] for key in OPTIONS if key in options} | {"group": options.get("group") or name}
        config = {**run.config(), "run": run.facts}
        tracker = WandbRun(run.path, config, name=f"{run.stage}/{name}", resume=resume, **settings)
    return Loggers([CsvLogger(run.metrics_file, last_row, tracker)], tracker, options)


def save_grid(
    module: LightningModule,
    folder: Path,
    name: str,
    grid: Image.Image,
    images: list[Image.Image],
    captions: list,
) -> None:
    """Save an image grid in `folder`, and log its images and captions to W&B if enabled."""
    if not module.trainer.is_global_zero:
        return
    step = module.trainer.global_step
    file = folder / f"{name}_{step:07d}.png"
    with warn_on_write_error(file):
        folder.mkdir(parents=True, exist_ok=True)
        grid.save(file)
    for logger in module.loggers:
        if isinstance(logger, CsvLogger) and logger.tracker is not None:
            logger.tracker.log_images(name, images, captions, step)
