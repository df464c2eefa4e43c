"""metrics.csv always, W&B unless told otherwise."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from ldm.files.atomic import write_text
from ldm.latents.cache import latents_folder
from ldm.latents.contract import LatentContract
from ldm.runs.disk import forgiving
from ldm.runs.lineage import inputs, outputs
from ldm.runs.run import Run
from ldm.tracking.run import OPTIONS, PLAIN, WandbRun


@dataclass
class Loggers:
    """What Lightning logs to, and the W&B run behind it where there is one."""

    lightning: list[Logger]
    wandb: WandbRun | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def conclude(self, run: Run, figures: Mapping[str, Any], pictures: Sequence[str]) -> None:
        """Log how a finished run ended: its figures, its pictures, what it was made from and what it leaves."""
        if self.wandb is None:
            return
        self.wandb.summarise(figures)
        for path in map(Path, pictures):
            with Image.open(path) as picture:
                self.wandb.log_images(path.stem, [picture], [path.stem], figures["steps"])
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
        resume: The rows that are there are kept; otherwise they are deleted.
    """

    ROWS_AT_A_TIME = 100

    def __init__(self, file: Path, *, resume: bool) -> None:
        super().__init__()
        self.file = file
        self._rows: list[dict[str, Any]] = []
        self._columns: list[str] = []
        if not resume:
            file.unlink(missing_ok=True)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def go_back(self, last: int) -> None:
        """Forget the rows of steps after `last`: training goes on from there, and they will come again."""
        self._rows = [row for row in self._rows if row["step"] <= last]
        if self.file.is_file():
            with forgiving(self.file):
                columns, rows = _read(self.file)
                rows = [row for row in rows if row["step"].isdigit() and int(row["step"]) <= last]
                write_text(self.file, _as_csv(columns, rows, header=True))
                self._columns = columns

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The config is in config.yaml."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._rows.append({**metrics, "step": step or 0})
        if len(self._rows) >= self.ROWS_AT_A_TIME:
            self.save()

    def save(self) -> None:
        if not self._rows:
            return
        with forgiving(self.file):
            if set().union(*self._rows) <= set(self._columns) and self.file.is_file():
                self._append()
            else:
                self._rewrite()
            self._rows = []

    def _append(self) -> None:
        size = self.file.stat().st_size
        try:
            with self.file.open("a", encoding="utf-8", newline="") as file:
                file.write(_as_csv(self._columns, self._rows))
        except OSError:
            os.truncate(self.file, size)
            raise

    def _rewrite(self) -> None:
        """Whole, with the columns that are new."""
        columns, rows = _read(self.file) if self.file.is_file() else ([], [])
        columns = sorted(set(columns).union(*self._rows))
        write_text(self.file, _as_csv(columns, [*rows, *self._rows], header=True))
        self._columns = columns

    def finalize(self, status: str) -> None:
        self.save()


def _read(file: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows; a last line that a kill cut is dropped."""
    *lines, _ = file.read_text(encoding="utf-8", errors="replace").split("\n")
    table = csv.DictReader(lines, restval="")
    rows = list(table)
    return (list(table.fieldnames or []), rows) if "step" in (table.fieldnames or []) else (["step"], [])


def _as_csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *, header: bool = False) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def make_loggers(
    options: Mapping[str, Any], run: Run, *, resume: bool, last_row: int | None = None, main_process: bool = True
) -> Loggers:
    """Loggers for a run folder, from the config group `logger`; none in the other processes of a distributed run.

    Args:
        resume: The run is continued, not begun.
        last_row: The step up to which the rows in metrics.csv are kept; None keeps all.
    """
    if not main_process:
        return Loggers([])
    table = CsvLogger(run.metrics_file, resume=resume)
    if resume and last_row is not None:
        table.go_back(last_row)
    if not options["wandb"]:
        return Loggers([table])
    name = run.facts["name"]
    chosen = PLAIN | {key: options[key] for key in OPTIONS if key in options}
    chosen["group"] = chosen["group"] or name
    tracker = WandbRun(
        run.path, {**run.config(), "run": run.facts}, name=f"{run.stage}/{name}", resume=resume, **chosen
    )
    return Loggers([table, WandbLogger(tracker)], tracker, options)


class WandbLogger(Logger):
    """Hands Lightning's metrics to our W&B run."""

    def __init__(self, run: WandbRun) -> None:
        super().__init__()
        self.tracker = run

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return self.tracker.id

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.tracker.configure(dict(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.tracker.log(metrics, step or 0)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Left open: pictures and the summary follow after training; the command closes it."""


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
        if isinstance(logger, WandbLogger):
            logger.tracker.log_images(name, images, captions, step)
