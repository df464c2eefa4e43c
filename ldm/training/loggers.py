"""CSV always, W&B unless told otherwise."""

from collections.abc import Mapping
from dataclasses import dataclass
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


def make_loggers(options: Mapping[str, Any], run: Run, *, resume: bool) -> Loggers:
    """Loggers for a run folder, from the config group `logger`."""
    metrics = run.path / "metrics.csv"
    if metrics.exists() and not resume:
        metrics.unlink()
    csv: Logger = CSVLogger(run.path.parent, name=run.path.name, version="")
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
