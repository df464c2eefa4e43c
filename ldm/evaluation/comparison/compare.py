"""Comparison of runs: config differences, metrics by group, and a verdict for each metric."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ldm.evaluation.comparison import statistics
from ldm.evaluation.comparison.runs import RunRecord, read_runs
from ldm.evaluation.comparison.statistics import Estimate, Verdict, better_direction, differing_settings
from ldm.metrics.metric import Metric

IDENTITY = ("data_fingerprint", "contract.autoencoder_sha256", "precision")
"""Facts that must be equal for all runs of a group, in addition to their configs."""
HYDRA_SUFFIXES = ("_partial_", "_convert_")
FACTS = ("data", *IDENTITY, "commit", "python", "machine", "system")
"""Facts that are listed if they differ between runs."""


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    label: str
    runs: list[RunRecord]

    @property
    def title(self) -> str:
        return f"{self.label}: {self.runs[0].name}" + (f" and {len(self.runs) - 1} more" if len(self.runs) > 1 else "")

    def values(self, metric: str) -> list[Metric]:
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]

    def has_enough_seeds(self, metric: str) -> bool:
        """Return True if at least MIN_SEEDS runs have the metric and their seeds are distinct."""
        seeds = [str(run.seed) for run in self.runs if metric in run.metrics]
        return len(seeds) >= statistics.MIN_SEEDS and len(set(seeds)) == len(seeds)


@dataclass(frozen=True)
class Row:
    """One metric, with an estimate for each group and a verdict for each group except the first, which is the
    baseline.

    Field names are keys in compare.json.
    """

    metric: str
    better: str | None
    """The better direction, "higher" or "lower"; None if the metric has no better direction."""
    groups: list[Estimate | None]
    verdicts: list[Verdict]


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison, without images."""

    groups: list[Group]
    differences: dict[str, list[str]]
    """Config keys and facts that differ, with the value for each group."""
    rows: list[Row]
    equal_metrics: dict[str, float]
    """Values of metrics that are equal in all runs."""
    notes: list[str]

    @property
    def runs(self) -> list[tuple[Group, RunRecord]]:
        return [(group, run) for group in self.groups for run in group.runs]

    def curve_names(self) -> list[str]:
        """Return the names of the curves to plot: all validation curves and the training loss."""
        names = {name for _, run in self.runs for name in run.curves}
        return sorted(name for name in names if name.startswith("val/")) + sorted({"train/loss"} & names)

    def content(self) -> dict[str, Any]:
        """Return the content of compare.json."""
        runs = [
            {"group": group.label, "run": run.source, "name": run.name, "stage": run.stage, "seed": run.seed}
            | {"figures": {name: _metric_content(metric) for name, metric in run.metrics.items()}}
            for group, run in self.runs
        ]
        content = {"confidence": statistics.CONFIDENCE, "runs": runs, "differences": self.differences}
        return {**content, "figures": list(map(asdict, self.rows)), "equal": self.equal_metrics, "notes": self.notes}


def _metric_content(metric: Metric) -> dict[str, Any]:
    interval = statistics.estimate([metric], enough_seeds=False).interval
    return {key: getattr(metric, key) for key in ("value", "standard_error", "settings")} | {"interval": interval}


def compare_runs(sources: Sequence[str]) -> Comparison:
    """Read runs, group them, and compare each group with the first one.

    Args:
        sources: Run folders or W&B paths `entity/project/run`.

    Raises:
        UserError: As raised by `read_runs`.
    """
    groups = group_runs(read_runs(sources))
    runs = [run for group in groups for run in group.runs]
    rows, equal = [], {}
    for name in sorted(dict.fromkeys(name for run in runs for name in run.metrics), key=_row_order):
        values = [run.metrics[name].value for run in runs if name in run.metrics]
        if len(values) == len(runs) and len(set(values)) == 1:
            equal[name] = values[0]
        else:
            rows.append(_compare_metric(name, groups))
    return Comparison(groups, config_differences(groups), rows, equal, list(_notes(groups, rows)))


def _row_order(name: str) -> tuple[bool, bool]:
    """Return a sort key that puts quality metrics first, and metrics of evaluations before validation curves."""
    return (not better_direction(name), name.startswith("val/"))


def _compare_metric(name: str, groups: Sequence[Group]) -> Row:
    by_group = [(group.label, group.values(name), group.has_enough_seeds(name)) for group in groups]
    estimates = [
        statistics.estimate(metrics, enough_seeds=enough_seeds) if metrics and not differing_settings(metrics) else None
        for _, metrics, enough_seeds in by_group
    ]
    (first_label, baseline, first_enough), *candidates = by_group
    verdicts = [
        statistics.compare_groups(name, baseline, metrics, (first_label, label), enough_seeds=enough and first_enough)
        for label, metrics, enough in candidates
    ]
    return Row(name, {1: "higher", -1: "lower", 0: None}[better_direction(name)], estimates, verdicts)


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """Group runs that differ only in their seed. Groups are labelled A, B, C and so on, in order of appearance."""
    members: dict[str, list[RunRecord]] = {}
    for run in runs:
        config = {key: value for key, value in run.options.items() if key != "seed"}
        key = json.dumps([config, [run.facts.get(fact) for fact in IDENTITY]], sort_keys=True, default=str)
        members.setdefault(key, []).append(run)
    labels = [chr(65 + i) if i < 26 else f"G{i + 1}" for i in range(len(members))]
    return [Group(label, group) for label, group in zip(labels, members.values(), strict=True)]


def config_differences(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Return the config keys and facts that differ between groups, or between the runs of a single group."""
    descriptions = [[_describe(run) for run in group.runs] for group in groups]
    runs = [run for group in descriptions for run in group]
    differences: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for run in runs for key in run):
        by_group = [", ".join(dict.fromkeys(run.get(key, "-") for run in group)) for group in descriptions]
        if len(set(by_group)) > 1 or len({run.get(key) for run in runs}) > 1 == len(groups):
            differences[key] = by_group
    return differences


def _describe(run: RunRecord) -> dict[str, str]:
    """Return the options and facts of a run that can differ between runs, as short strings."""
    flat = {key: value for key, value in run.options.items() if key != "seed" and not key.endswith(HYDRA_SUFFIXES)}
    # omit constructor arguments that repeat an option, such as optimizer.build.lr, which repeats optimizer.lr
    flat = {key: value for key, value in flat.items() if ".build." not in key or key.replace("build.", "") not in flat}
    facts = {key: value for key, value in run.facts.items() if key in FACTS or key.startswith("versions.")}
    return {key: _short_value(key, value) for key, value in {**flat, "seed": run.seed, **facts}.items()}


def _short_value(key: str, value: Any) -> str:
    text = str(value)
    if key.endswith("_target_"):
        return text.rpartition(".")[2]
    return text[:12] if re.fullmatch(r"[0-9a-f]{40,}", text) else text


def _notes(groups: Sequence[Group], rows: Sequence[Row]) -> Iterator[str]:
    """Yield caveats about the verdicts. docs/comparing_runs.md explains them."""
    differences = [verdict.difference for row in rows if row.better for verdict in row.verdicts]
    if any(difference is not None and difference.of == statistics.SAMPLING for difference in differences):
        yield (
            f"{statistics.SAMPLING}: training with a different seed can change a metric by more than the sampling "
            f"noise. Train with at least {statistics.MIN_SEEDS} seeds per group to measure that variation."
        )
    for i, group in enumerate(groups[1:]):
        verdicts = {row.metric: row.verdicts[i] for row in rows if row.better}
        tests = {name: item.difference.p_value for name, item in verdicts.items() if item.difference is not None}
        p_values = {name: value for name, value in tests.items() if value is not None}
        significant = [f"{name.replace('_', ' ')} ({verdicts[name].verdict})" for name in statistics.holm(p_values)]
        result = f"significant difference in {', '.join(significant)}" if significant else "within noise"
        if p_values:
            yield f"{group.label} vs {groups[0].label}, all {len(p_values)} metrics (Holm's test, 5%): {result}."
    runs = [run for group in groups for run in group.runs]
    concerns = {
        "Training not finished": [run for run in runs if not run.finished],
        "Some curves end in a non-finite value and are not compared": [
            run for run in runs if not all(math.isfinite(values[-1]) for _, values in run.curves.values())
        ],
        "Evaluation ignored, because the weights have changed since (run tools/evaluate.py)": [
            run for run in runs if run.has_stale_evaluation
        ],
        "No evaluation (run tools/evaluate.py)": [run for run in runs if not run.evaluation],
    }
    for concern, affected in concerns.items():
        if affected:
            yield f"{concern}: {', '.join(run.source for run in affected)}."
