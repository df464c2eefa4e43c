"""What is known of runs that are to be compared, read from their folders or from W&B into one form."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.evaluation.comparison.statistics import better_direction
from ldm.evaluation.evaluation_file import finite_numbers, metrics_from_json
from ldm.evaluation.reconstructions.curves import Curve, as_curve, read_curves
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
EVALUATION = "evaluation."


@dataclass(frozen=True)
class RunRecord:
    """What is known of one run, wherever it was read."""

    place: str
    name: str
    stage: str
    seed: Any
    finished: bool
    config: dict[str, Any]
    """Flat, without PLACES."""
    facts: dict[str, Any]
    """Flat."""
    metrics: dict[str, Metric]
    evaluated: bool
    stale: bool
    """Its evaluation is of other weights than it has now, and left out."""
    curves: dict[str, Curve]
    run: Run | None = field(repr=False, default=None)
    """Where it is a folder, whose weights are at hand."""

    @property
    def diverged(self) -> list[str]:
        """Curves that end in no number."""
        return [name for name, (_, values) in self.curves.items() if not math.isfinite(values[-1])]


def read_runs(places: Sequence[str]) -> list[RunRecord]:
    """Read runs: folders, or `entity/project/run` of W&B.

    Raises:
        UserError: fewer than two, one that is none, one twice, runs of both stages.
    """
    if len(places) < 2:
        given = f", not {places[0]} alone" if places else ""
        raise UserError(f"A comparison needs two runs at least{given}: python tools/compare.py RUN RUN [RUN ...].")
    resolved = [Path(place).expanduser().resolve() for place in places]
    for i, place in enumerate(places):
        if resolved[i] in resolved[:i]:
            raise UserError(f"{place} is given twice: a run says nothing about itself.")
    runs = [from_wandb(place) if is_of_wandb(place) else from_folder(place) for place in places]
    stages: dict[str, list[str]] = {}
    for run in runs:
        stages.setdefault(run.stage, []).append(run.place)
    if len(stages) > 1:
        of = "; ".join(f"stage {stage}: {', '.join(named)}" for stage, named in stages.items())
        raise UserError(f"Runs of different stages have no metric in common. {of}. Compare those of one stage.")
    return runs


def is_of_wandb(place: str) -> bool:
    """`entity/project/run`, unless it lies here or its first folder does."""
    path = Path(place).expanduser()
    here = path.exists() or Path(path.parts[0]).is_dir() or path.parts[0] == "runs"
    return not here and re.fullmatch(r"[\w.-]+/[\w. -]+/[\w-]+", place) is not None


def from_folder(place: str) -> RunRecord:
    """A run folder: config.yaml, run.json, metrics.csv and evaluation.json, the last two where there are any."""
    run = Run.open(place, "runs")
    return _record(
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
    config, summary, history = fetch_run(place)
    facts = _with_prefix(config, "run.")
    if facts.get("stage") not in OF_LOSS:
        raise UserError(f"{place} is in W&B, but no training of this program: its config has no run.stage.")
    logged = _with_prefix(summary, EVALUATION)  # flat: what stands inside a mapping is `sampler.steps`
    evaluation = {key: value for key, value in logged.items() if "." not in key}
    if sampler := _with_prefix(logged, "sampler."):
        evaluation["sampler"] = sampler
    points: dict[str, dict[int, float]] = {}
    for row in history:
        for name, value in row.items():
            if "/" in name and isinstance(value, int | float) and row.get("step") is not None:
                points.setdefault(name, {})[int(row["step"])] = float(value)
    curves = {name: as_curve(values) for name, values in points.items()}
    figures = {key: value for key, value in summary.items() if not re.search(r"^_|/|^step$|^evaluation\.", key)}
    last = max((steps[-1] for steps, _ in curves.values()), default=0)
    return _record(
        place,
        config={key: value for key, value in config.items() if not key.startswith(("run.", EVALUATION))},
        facts=facts,
        finished="training_s" in figures and last <= figures.get("steps", last),  # else it was trained on since
        figures=figures,
        evaluation=evaluation,
        weights=summary.get({"vae": "autoencoder_sha256", "diffusion": "pipeline_sha256"}[facts["stage"]]),
        curves=curves,
    )


def _with_prefix(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def _record(
    place: str,
    *,
    config: dict[str, Any],
    facts: dict[str, Any],
    finished: bool,
    figures: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    weights: str | None,
    curves: dict[str, Curve],
    run: Run | None = None,
) -> RunRecord:
    stage = facts["stage"]
    stale = evaluation.get("weights_sha256") not in (None, weights) and weights is not None
    if stale:
        evaluation = {}
    data = {"data_fingerprint": facts.get("data_fingerprint"), "val_images": config.get("val_images")}
    found = {
        name: Metric(value, settings=data if better_direction(name) else {})
        for name, value in finite_numbers(figures).items()
    }
    found |= metrics_from_json(evaluation)
    latents = {}
    if stage == "diffusion":
        autoencoder = facts.get("contract.autoencoder_sha256")
        latents = {"autoencoder": autoencoder, "latent_statistics": config.get("latent_statistics")}
    loss = {part: {key: config[key] for key in config if key.startswith(part)} for part in OF_LOSS[stage]}
    for name, (_, values) in curves.items():
        short = name.removeprefix("val/")
        if short != name and short not in {**figures, **evaluation} and math.isfinite(values[-1]):
            found[name] = Metric(values[-1], settings={**data, **latents, **(loss if "loss" in short else {})})
    inside = tuple(f"{key}." for key in PLACES)
    return RunRecord(
        place=place,
        name=str(facts.get("name") or Path(place).name),
        stage=stage,
        seed=config.get("seed", facts.get("seed")),
        finished=finished,
        config={key: v for key, v in config.items() if key not in PLACES and not key.startswith(inside)},
        facts=facts,
        metrics=found,
        evaluated=bool(evaluation),
        stale=stale,
        curves=curves,
        run=run,
    )
