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
    evaluation_seed: Any
    stale: bool
    """Its evaluation is of other weights than it has now, and left out."""
    doubtful: bool
    """Its evaluation does not say of which weights it is."""
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
    known: dict[str, str] = {}
    for place in places:
        same = str(Path(place).expanduser().resolve())
        if same in known:
            raise UserError(f"{place} is given twice (as {known[same]}): a run says nothing about itself.")
        known[same] = place
    runs = [from_wandb(place) if is_of_wandb(place) else from_folder(place) for place in places]
    stages = {
        stage: [run.place for run in runs if run.stage == stage] for stage in dict.fromkeys(r.stage for r in runs)
    }
    if len(stages) > 1:
        of = "; ".join(f"stage {stage}: {', '.join(named)}" for stage, named in stages.items())
        raise UserError(f"Runs of different stages have no figure in common. {of}. Compare those of one stage.")
    return runs


def is_of_wandb(place: str) -> bool:
    """`entity/project/run`, unless it lies here or its first folder does."""
    path = Path(place).expanduser()
    here = path.exists() or Path(path.parts[0]).is_dir() or path.parts[0] == "runs"
    return not here and re.fullmatch(r"[\w.-]+/[\w. -]+/[\w-]+", place) is not None


def from_folder(place: str) -> RunRecord:
    """A run folder: config.yaml, run.json, metrics.csv and evaluation.json, the last two where there are any."""
    run = Run.open(place, "runs")
    facts = {key: value for key, value in run.facts.items() if key != "figures"}
    evaluation = run.evaluation_file
    metrics = run.metrics_file
    return _record(
        str(run.path),
        config=flatten(run.config()),
        facts=flatten(facts),
        figures=run.facts.get("figures") or {},
        evaluation=read_json(evaluation) if evaluation.is_file() else {},
        weights=run_weights_sha256(run),
        curves=read_curves(metrics) if metrics.is_file() else {},
        run=run,
    )


def from_wandb(place: str) -> RunRecord:
    """A run of W&B, with the metrics of the newest tools/evaluate.py on it that was logged there."""
    config, summary, history = fetch_run(place)
    facts = {key.removeprefix("run."): value for key, value in config.items() if key.startswith("run.")}
    if facts.get("stage") not in OF_LOSS:
        raise UserError(f"{place} is in W&B, but no training of this program: its config has no run.stage.")
    logged = _with_prefix(summary, EVALUATION)  # flat: what stands inside a mapping is `sampler.steps`
    evaluation = {key: value for key, value in logged.items() if "." not in key}
    if sampler := _with_prefix(logged, "sampler."):
        evaluation["sampler"] = sampler
    own = [key for key in config if not key.startswith(("run.", EVALUATION))]
    points: dict[str, dict[int, float]] = {}
    for row in history:
        for name, value in row.items():
            if "/" in name and isinstance(value, int | float) and row.get("step") is not None:
                points.setdefault(name, {})[int(row["step"])] = float(value)
    curves = {name: as_curve(values) for name, values in points.items()}
    figures = {key: value for key, value in summary.items() if not re.search(r"^_|/|^step$|^evaluation\.", key)}
    last = max((steps[-1] for steps, _ in curves.values()), default=0)
    # the config was written at the start; metrics of an end that was trained on since are not of this end
    finished = facts.get("finished") is not None or ("training_s" in figures and last <= figures.get("steps", last))
    return _record(
        place,
        config={key: config[key] for key in own},
        facts={**facts, "finished": finished or None},
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
    figures: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    weights: str | None,
    curves: dict[str, Curve],
    run: Run | None = None,
) -> RunRecord:
    stage, evaluated = facts["stage"], evaluation.get("weights_sha256")
    of_weights = None if weights is None or evaluated is None else evaluated == weights
    doubtful = bool(evaluation) and of_weights is None and (weights or evaluated) is not None
    if of_weights is False:
        evaluation = {}
    data = {"data_fingerprint": facts.get("data_fingerprint"), "val_images": config.get("val_images")}
    latents = {
        "autoencoder": facts.get("contract.autoencoder_sha256"),
        "latent_statistics": config.get("latent_statistics"),
    }
    loss = {part: {key: config[key] for key in config if key.startswith(part)} for part in OF_LOSS[stage]}
    found: dict[str, Metric] = {}
    for name, (_, values) in curves.items():
        if name.startswith("val/") and (short := name.removeprefix("val/")) not in {**figures, **evaluation}:
            settings = {**data, **(latents if stage == "diffusion" else {}), **(loss if "loss" in short else {})}
            if math.isfinite(values[-1]):
                found[name] = Metric(values[-1], settings=settings)
    for name, value in finite_numbers(figures).items():
        found[name] = Metric(value, settings=data if better_direction(name) else {})
    found |= metrics_from_json(evaluation)
    inside = tuple(f"{key}." for key in PLACES)
    return RunRecord(
        place=place,
        name=str(facts.get("name") or Path(place).name),
        stage=stage,
        seed=config.get("seed", facts.get("seed")),
        finished=facts.get("finished") is not None,
        config={key: v for key, v in config.items() if key not in PLACES and not key.startswith(inside)},
        facts=facts,
        metrics=found,
        evaluation_seed=evaluation.get("seed"),
        stale=of_weights is False,
        doubtful=doubtful,
        curves=curves,
        run=run,
    )
