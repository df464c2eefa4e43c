"""CSV always, W&B unless told otherwise."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger
from PIL import Image

from ldm.data.latents import LatentContract, latents_folder
from ldm.lineage import inputs, outputs
from ldm.run import Run
from ldm.tracking import OPTIONS, WandbRun
from ldm.training.callbacks import WandbLogger


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
        if run.stage == "vae" and self.options["upload_latents"]:
            latents = latents_folder(LatentContract.load(run.path), run.config()["data"]["cache_dir"])
        for item in inputs(run):
            self.wandb.take(item)
        for item in outputs(run, latents):
            self.wandb.leave(item)
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
    name = run.facts["name"]
    chosen = {key: options[key] for key in OPTIONS} | {"group": options["group"] or name}
    tracker = WandbRun(
        run.path, {**run.config(), "run": run.facts}, name=f"{run.stage}/{name}", resume=resume, **chosen
    )
    return Loggers([csv, WandbLogger(tracker)], tracker, options)
