"""CSV always, W&B unless told otherwise."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger

from ldm.run import Run
from ldm.tracking import WandbRun
from ldm.training.callbacks import WandbLogger


@dataclass
class Loggers:
    """What Lightning logs to, and the W&B run behind it where there is one."""

    lightning: list[Logger]
    wandb: WandbRun | None = None

    def summarise(self, figures: Mapping[str, Any]) -> None:
        if self.wandb is not None:
            self.wandb.summarise(figures)

    def finish(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()


def _csv_logger(folder: Path, resume: bool) -> Logger:
    """metrics.csv in the run folder; a resumed run goes on in it, where Lightning alone would delete it."""
    metrics = folder / "metrics.csv"
    known = metrics.read_text(encoding="utf-8") if resume and metrics.is_file() else None
    logger = CSVLogger(folder.parent, name=folder.name, version="")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*exists and is not empty.*")
        writer = logger.experiment
    if known:
        metrics.write_text(known, encoding="utf-8")
        writer.metrics_keys = known.splitlines()[0].split(",")
    return logger


def make_loggers(options: Mapping[str, Any], run: Run, *, resume: bool, main_process: bool = True) -> Loggers:
    """Loggers for a run folder, from the config group `logger`; none in the other processes of a distributed run."""
    if not main_process:
        return Loggers([])
    csv = _csv_logger(run.path, resume)
    if not options["wandb"]:
        return Loggers([csv])
    tracker = WandbRun(
        run.path,
        {**run.config(), "run": run.facts},
        project=options["project"],
        entity=options["entity"],
        name=f"{run.stage}/{run.facts['name']}",
        group=options["group"] or run.facts["name"],
        tags=options["tags"],
        mode=options["mode"],
        resume=resume,
    )
    return Loggers([csv, WandbLogger(tracker)], tracker)
