"""metrics.csv always, W&B unless told otherwise."""

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
from ldm.runs.disk import forgiving
from ldm.runs.lineage import inputs, outputs
from ldm.runs.run import Run
from ldm.tracking.run import OPTIONS, WandbRun


@dataclass
class Loggers:
    """What Lightning logs to, and the W&B run behind it where there is one."""

    lightning: list[Logger]
    wandb: WandbRun | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def conclude(self, run: Run, figures: Mapping[str, Any], picture: Path) -> None:
        """Log how a finished run ended: its figures, its picture, what it was made from and what it leaves."""
        if self.wandb is None:
            return
        self.wandb.summarise(figures)
        with Image.open(picture) as image:
            self.wandb.log_images(picture.stem, [image], [picture.stem], figures["steps"])
        latents = None
        if run.stage == "vae" and self.options.get("upload_latents"):
            latents = latents_folder(LatentContract.load(run.path), run.config()["data"]["cache_dir"])
        for item in inputs(run):
            self.wandb.take(item)
        for item in outputs(run, latents):
            self.wandb.leave(item)
        self.wandb.finish()


class CsvLogger(Logger):
    """metrics.csv: a row of what is logged together, in columns by name. A disk that refuses it ends nothing.

    Args:
        last_row: The step up to which the rows that are there are kept.
        tracker: A W&B run, which is handed the same. It is left open at the end: pictures and the summary follow.
    """

    name, version = "csv", ""

    def __init__(self, file: Path, last_row: int = -1, tracker: WandbRun | None = None) -> None:
        super().__init__()
        self.file, self.tracker = file, tracker
        self._rows: list[dict[str, Any]] = []
        self._rows_at_a_time = 100
        self.go_back(last_row)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The config is in config.yaml, and W&B has it from the start."""

    def go_back(self, last: int) -> None:
        """Forget the rows of steps after `last`: training goes on from there, and they will come again."""
        self._rows = [row for row in self._rows if row["step"] <= last]
        if self.file.is_file():
            self._write(last)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._rows.append({**metrics, "step": step or 0})
        if self.tracker is not None:
            self.tracker.log(metrics, step or 0)
        if len(self._rows) >= self._rows_at_a_time:
            self.save()

    def save(self) -> None:
        if self._rows:
            self._write()

    def _write(self, last: float = math.inf) -> None:
        """The file anew: its rows up to a step, and those that it has not got yet."""
        with forgiving(self.file):
            columns, rows = _read(self.file)
            rows = [row for row in rows if int(row["step"]) <= last] + self._rows
            columns = sorted({"step"}.union(columns, *self._rows))
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_text(self.file, text.getvalue())
            self._rows = []
            self._rows_at_a_time = max(100, len(rows) // 100)  # or the writing would come to cost more than training


def _read(file: Path) -> tuple[Sequence[str], list[dict[str, Any]]]:
    """Columns and rows that have a step; a last line that a kill cut is dropped."""
    *lines, _ = (file.read_text(encoding="utf-8", errors="replace") if file.is_file() else "").split("\n")
    table = csv.DictReader(lines, restval="")
    return table.fieldnames or [], [row for row in table if row.get("step", "").isdigit()]


def make_loggers(
    options: Mapping[str, Any], run: Run, *, resume: bool, last_row: int = -1, main_process: bool = True
) -> Loggers:
    """Loggers for a run folder, from the config group `logger`; none in the other processes of a distributed run.

    Args:
        resume: The run is continued, not begun.
        last_row: The step up to which the rows in metrics.csv are kept.
    """
    if not main_process:
        return Loggers([])
    tracker = None
    if options["wandb"]:
        name = run.facts["name"]
        chosen = {key: options[key] for key in OPTIONS if key in options} | {"group": options.get("group") or name}
        config = {**run.config(), "run": run.facts}
        tracker = WandbRun(run.path, config, name=f"{run.stage}/{name}", resume=resume, **chosen)
    return Loggers([CsvLogger(run.metrics_file, last_row, tracker)], tracker, options)


def save_grid(
    module: LightningModule,
    folder: Path,
    name: str,
    grid: Image.Image,
    images: list[Image.Image],
    captions: list,
) -> None:
    """A picture into `folder`, and its parts with captions into W&B where it is on."""
    if not module.trainer.is_global_zero:
        return
    step = module.trainer.global_step
    file = folder / f"{name}_{step:07d}.png"
    with forgiving(file):
        folder.mkdir(parents=True, exist_ok=True)
        grid.save(file)
    for logger in module.loggers:
        if isinstance(logger, CsvLogger) and logger.tracker is not None:
            logger.tracker.log_images(name, images, captions, step)
