"""What is known of runs that are to be compared, read from their folders or from W&B into one form."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.evaluation.comparison.statistics import better_direction
from ldm.evaluation.curves import Curve, as_curve, read_curves
from ldm.evaluation.evaluation_file import finite_numbers, metrics_from_json
from ldm.files.untrusted import read_json
from ldm.metrics.metric import Metric
from ldm.runs.lineage import run_weights_sha256
from ldm.runs.run import Run
from ldm.tracking.comparison import fetch_run
from ldm.tracking.run import flatten

DATA_PLACES = ("data.path", "data.source.path", "data.cache_dir")
PLACES = ("name", "runs_dir", "vae", "resume", "overwrite", "logger", "stage", *DATA_PLACES)
"""Keys of a config that name, place or log a run, for which its hashes stand; `stage` repeats the other keys."""
OF_LOSS = {
    "vae": ("autoencoder.loss", "regulariser", "perceptual", "adversarial"),
    "diffusion": ("objective", "schedule", "variance"),
}
"""Keys on which the value of a loss depends, whatever the model is worth."""


@dataclass(frozen=True)
class RunRecord:
    """What is known of one run, wherever it was read."""

    place: str
    config: dict[str, Any]
    """Flat."""
    facts: dict[str, Any]
    """Flat."""
    finished: bool
    figures: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    weights: str | None
    curves: dict[str, Curve]
    run: Run | None = field(repr=False, default=None)
    """Where it is a folder, whose weights are at hand."""

    @property
    def stage(self) -> str:
        return self.facts["stage"]

    @property
    def name(self) -> str:
        return str(self.facts.get("name") or Path(self.place).name)

    @property
    def seed(self) -> Any:
        return self.config.get("seed", self.facts.get("seed"))

    @property
    def stale(self) -> bool:
        """Its evaluation is of other weights than it has now, and left out."""
        evaluated = self.evaluation.get("weights_sha256")
        return None not in (evaluated, self.weights) and evaluated != self.weights

    @property
    def options(self) -> dict[str, Any]:
        """The config without PLACES."""
        inside = tuple(f"{key}." for key in PLACES)
        return {key: v for key, v in self.config.items() if key not in PLACES and not key.startswith(inside)}

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """Those of the evaluation, of the end of training and of its curves, with what they depend on."""
        data = {key: {**self.facts, **self.config}.get(key) for key in ("data_fingerprint", "val_images")}
        found = {
            name: Metric(value, settings=data if better_direction(name) else {})
            for name, value in finite_numbers(self.figures).items()
        }
        found |= {} if self.stale else metrics_from_json(self.evaluation)
        if self.stage == "diffusion":
            latents = {"autoencoder": self.facts.get("contract.autoencoder_sha256")}
            data = {**data, **latents, "latent_statistics": self.config.get("latent_statistics")}
        loss = {part: _with_prefix(self.config, part) for part in OF_LOSS[self.stage]}
        for name, (_, values) in self.curves.items():
            short = name.removeprefix("val/")
            if short != name and short not in found and math.isfinite(values[-1]):
                found[name] = Metric(values[-1], settings={**data, **(loss if "loss" in short else {})})
        return found


def read_runs(places: Sequence[str]) -> list[RunRecord]:
    """Read runs: folders, or `entity/project/run` of W&B.

    Raises:
        UserError: fewer than two, one that is none, one twice, runs of both stages.
    """
    if len(places) < 2:
        raise UserError(f"A comparison needs two runs, not {len(places)}: python tools/compare.py RUN RUN [RUN ...].")
    resolved = [Path(place).expanduser().resolve() for place in places]
    for i, place in enumerate(places):
        if resolved[i] in resolved[:i]:
            raise UserError(f"{place} is given twice: a run says nothing about itself.")
    runs = [from_wandb(place) if is_of_wandb(place) else from_folder(place) for place in places]
    if len({run.stage for run in runs}) > 1:
        of = ", ".join(f"{run.place} ({run.stage})" for run in runs)
        raise UserError(f"Runs of different stages have no metric in common: {of}. Compare those of one stage.")
    return runs


def is_of_wandb(place: str) -> bool:
    """`entity/project/run`, unless it lies here or its first folder does."""
    path = Path(place).expanduser()
    here = path.exists() or Path(path.parts[0]).is_dir() or path.parts[0] == "runs"
    return not here and re.fullmatch(r"[\w.-]+/[\w. -]+/[\w-]+", place) is not None


def from_folder(place: str) -> RunRecord:
    """A run folder: config.yaml, run.json, metrics.csv and evaluation.json, the last two where there are any."""
    run = Run.open(place, "runs")
    return RunRecord(
        str(run.path),
        config=flatten(run.config()),
        facts=flatten({key: value for key, value in run.facts.items() if key != "figures"}),
        finished=run.facts.get("finished") is not None,
        figures=run.facts.get("figures") or {},
        evaluation=read_json(run.evaluation_file) if run.evaluation_file.is_file() else {},
        weights=run_weights_sha256(run),
        curves=read_curves(run.metrics_file) if run.metrics_file.is_file() else {},
        run=run,
    )


def from_wandb(place: str) -> RunRecord:
    """A run of W&B, with the metrics of the newest tools/evaluate.py on it that was logged there."""
    config, summary, logged, history = fetch_run(place)
    facts = _with_prefix(config, "run.")
    if facts.get("stage") not in OF_LOSS:
        raise UserError(f"{place} is in W&B, but no training of this program: its config has no run.stage.")
    # flat: what stands inside a mapping is `sampler.steps`
    evaluation = {key: value for key, value in logged.items() if "." not in key}
    if sampler := _with_prefix(logged, "sampler."):
        evaluation["sampler"] = sampler
    points: dict[str, dict[int, float]] = {}
    for row in history:
        for name, value in row.items():
            if "/" in name and isinstance(value, int | float) and row.get("step") is not None:
                points.setdefault(name, {})[int(row["step"])] = float(value)
    curves = {name: as_curve(values) for name, values in points.items()}
    figures = {key: value for key, value in summary.items() if not re.search(r"^_|/|^step$", key)}
    last = max((steps[-1] for steps, _ in curves.values()), default=0)
    return RunRecord(
        place,
        config={key: value for key, value in config.items() if not key.startswith("run.")},
        facts=facts,
        finished="training_s" in figures and last <= figures.get("steps", last),  # else it was trained on since
        figures=figures,
        evaluation=evaluation,
        weights=summary.get({"vae": "autoencoder_sha256", "diffusion": "pipeline_sha256"}[facts["stage"]]),
        curves=curves,
    )


def _with_prefix(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
