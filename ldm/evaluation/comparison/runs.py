"""Records of the runs to compare, read from run folders or from W&B."""

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

DATA_PATH_KEYS = ("data.path", "data.source.path", "data.cache_dir")
IGNORED_KEYS = ("name", "runs_dir", "vae", "resume", "overwrite", "logger", "stage", *DATA_PATH_KEYS)
"""Config keys that are not compared: names, paths and logging. Data and weights are compared by digest, not by path.
Keys under `stage` repeat other keys."""
LOSS_KEYS = {
    "vae": ("autoencoder.loss", "regulariser", "perceptual", "adversarial"),
    "diffusion": ("objective", "schedule", "variance"),
}
"""Config keys that change the definition of a loss. Losses are comparable only if these keys are equal."""


@dataclass(frozen=True)
class RunRecord:
    """Data of one run, from its folder or from W&B."""

    source: str
    """Run folder or W&B path."""
    config: dict[str, Any]
    """Flattened config."""
    facts: dict[str, Any]
    """Flattened content of run.json, without its metrics."""
    finished: bool
    final_metrics: Mapping[str, Any]
    """Metrics written at the end of training."""
    evaluation: Mapping[str, Any]
    weights_sha256: str | None
    """Digest of the current weights."""
    curves: dict[str, Curve]
    run: Run | None = field(repr=False, default=None)
    """The run itself, if it was read from a folder."""

    @property
    def stage(self) -> str:
        return self.facts["stage"]

    @property
    def name(self) -> str:
        return str(self.facts.get("name") or Path(self.source).name)

    @property
    def seed(self) -> Any:
        return self.config.get("seed", self.facts.get("seed"))

    @property
    def has_stale_evaluation(self) -> bool:
        """True if the evaluation was made with different weights. Such an evaluation is ignored."""
        evaluated_sha256 = self.evaluation.get("weights_sha256")
        return None not in (evaluated_sha256, self.weights_sha256) and evaluated_sha256 != self.weights_sha256

    @property
    def options(self) -> dict[str, Any]:
        """The config without IGNORED_KEYS."""
        prefixes = tuple(f"{key}." for key in IGNORED_KEYS)
        return {key: v for key, v in self.config.items() if key not in IGNORED_KEYS and not key.startswith(prefixes)}

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """Metrics from the evaluation, the end of training and the validation curves, with their settings."""
        data = {key: {**self.facts, **self.config}.get(key) for key in ("data_fingerprint", "val_images")}
        metrics = {
            name: Metric(value, settings=data if better_direction(name) else {})
            for name, value in finite_numbers(self.final_metrics).items()
        }
        metrics |= {} if self.has_stale_evaluation else metrics_from_json(self.evaluation)
        if self.stage == "diffusion":
            latent_settings = {"autoencoder": self.facts.get("contract.autoencoder_sha256")}
            data = {**data, **latent_settings, "latent_statistics": self.config.get("latent_statistics")}
        loss = {key: _with_prefix(self.config, key) for key in LOSS_KEYS[self.stage]}
        for name, (_, values) in self.curves.items():
            short_name = name.removeprefix("val/")
            if short_name != name and short_name not in metrics and math.isfinite(values[-1]):
                metrics[name] = Metric(values[-1], settings={**data, **(loss if "loss" in short_name else {})})
        return metrics


def read_runs(sources: Sequence[str]) -> list[RunRecord]:
    """Read runs from folders or from W&B paths `entity/project/run`.

    Raises:
        UserError: If there are fewer than two runs, a run does not exist or is given twice, or the runs belong to
            different stages.
    """
    if len(sources) < 2:
        raise UserError(
            f"A comparison needs at least 2 runs, not {len(sources)}. Usage: python tools/compare.py RUN RUN [RUN ...]."
        )
    resolved = [Path(source).expanduser().resolve() for source in sources]
    for i, source in enumerate(sources):
        if resolved[i] in resolved[:i]:
            raise UserError(f"{source} is given twice. Remove the duplicate; a run cannot be compared with itself.")
    runs = [from_wandb(source) if is_wandb_path(source) else from_folder(source) for source in sources]
    if len({run.stage for run in runs}) > 1:
        stages = ", ".join(f"{run.source} ({run.stage})" for run in runs)
        raise UserError(f"Runs of different stages cannot be compared: {stages}. Give only runs of the same stage.")
    return runs


def is_wandb_path(source: str) -> bool:
    """Return True if `source` has the form `entity/project/run` and does not look like a local path."""
    path = Path(source).expanduser()
    is_local = path.exists() or Path(path.parts[0]).is_dir() or path.parts[0] == "runs"
    return not is_local and re.fullmatch(r"[\w.-]+/[\w. -]+/[\w-]+", source) is not None


def from_folder(source: str) -> RunRecord:
    """Read a run folder: config.yaml, run.json, and if present metrics.csv and evaluation.json."""
    run = Run.open(source, "runs")
    return RunRecord(
        str(run.path),
        config=flatten(run.config()),
        facts=flatten({key: value for key, value in run.facts.items() if key != "figures"}),
        finished=run.facts.get("finished") is not None,
        final_metrics=run.facts.get("figures") or {},
        evaluation=read_json(run.evaluation_file) if run.evaluation_file.is_file() else {},
        weights_sha256=run_weights_sha256(run),
        curves=read_curves(run.metrics_file) if run.metrics_file.is_file() else {},
        run=run,
    )


def from_wandb(source: str) -> RunRecord:
    """Read a run from W&B, with the metrics of the most recent evaluation logged there."""
    config, summary, logged, history = fetch_run(source)
    facts = _with_prefix(config, "run.")
    if facts.get("stage") not in LOSS_KEYS:
        raise UserError(
            f"The W&B run {source} is not a training run of this program: run.stage is missing from its config. Give "
            "the W&B path of a training run."
        )
    # W&B values are flat: nested keys look like `sampler.steps`
    evaluation = {key: value for key, value in logged.items() if "." not in key}
    if sampler := _with_prefix(logged, "sampler."):
        evaluation["sampler"] = sampler
    points: dict[str, dict[int, float]] = {}
    for row in history:
        for name, value in row.items():
            if "/" in name and isinstance(value, int | float) and row.get("step") is not None:
                points.setdefault(name, {})[int(row["step"])] = float(value)
    curves = {name: as_curve(values) for name, values in points.items()}
    final_metrics = {key: value for key, value in summary.items() if not re.search(r"^_|/|^step$", key)}
    last_step = max((steps[-1] for steps, _ in curves.values()), default=0)
    return RunRecord(
        source,
        config={key: value for key, value in config.items() if not key.startswith("run.")},
        facts=facts,
        # a resumed run that is still training has logged steps after its final metrics
        finished="training_s" in final_metrics and last_step <= final_metrics.get("steps", last_step),
        final_metrics=final_metrics,
        evaluation=evaluation,
        weights_sha256=summary.get({"vae": "autoencoder_sha256", "diffusion": "pipeline_sha256"}[facts["stage"]]),
        curves=curves,
    )


def _with_prefix(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
