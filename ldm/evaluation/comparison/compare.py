"""Runs beside each other: what differs between them, their metrics by group, and which of them are better."""

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
"""Facts that the runs of a group share, as they share their configs."""
OF_HYDRA = ("_partial_", "_convert_")
FACTS = ("data", *IDENTITY, "commit", "python", "machine", "system")


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed."""

    label: str
    runs: list[RunRecord]

    @property
    def title(self) -> str:
        return f"{self.label}: {self.runs[0].name}" + (f" and {len(self.runs) - 1} more" if len(self.runs) > 1 else "")

    def of(self, metric: str) -> list[Metric]:
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]

    def enough_seeds(self, metric: str) -> bool:
        """Of the runs that have the metric: as many as a spread needs, and no seed twice."""
        seeds = [str(run.seed) for run in self.runs if metric in run.metrics]
        return len(seeds) >= statistics.FEWEST_SEEDS and len(set(seeds)) == len(seeds)


@dataclass(frozen=True)
class Row:
    """One metric in every group, and what is said of each group but the first beside the first.

    Its fields are keys of compare.json.
    """

    metric: str
    better: str | None
    groups: list[Estimate | None]
    verdicts: list[Verdict]


@dataclass(frozen=True)
class Comparison:
    """All that is found out without drawing an image."""

    groups: list[Group]
    differences: dict[str, list[str]]
    """By key, the value of each group."""
    rows: list[Row]
    equal: dict[str, float]
    """Metrics that are the same in every run."""
    notes: list[str]

    @property
    def runs(self) -> list[tuple[Group, RunRecord]]:
        return [(group, run) for group in self.groups for run in group.runs]

    def curve_names(self) -> list[str]:
        """What is drawn: everything of the held-out images, and the training loss."""
        found = {name for _, run in self.runs for name in run.curves}
        return sorted(name for name in found if name.startswith("val/")) + sorted({"train/loss"} & found)

    def content(self) -> dict[str, Any]:
        """For compare.json."""
        runs = [
            {"group": group.label, "run": run.place, "name": run.name, "stage": run.stage, "seed": run.seed}
            | {"figures": {name: _metric_content(metric) for name, metric in run.metrics.items()}}
            for group, run in self.runs
        ]
        known = {"confidence": statistics.CONFIDENCE, "runs": runs, "differences": self.differences}
        return {**known, "figures": list(map(asdict, self.rows)), "equal": self.equal, "notes": self.notes}


def _metric_content(metric: Metric) -> dict[str, Any]:
    interval = statistics.estimate([metric], enough_seeds=False).interval
    return {key: getattr(metric, key) for key in ("value", "standard_error", "settings")} | {"interval": interval}


def compare_runs(places: Sequence[str]) -> Comparison:
    """Read, group and judge runs; the first group is the one that the others are held against.

    Args:
        places: Folders, or `entity/project/run` of W&B.

    Raises:
        UserError: what `read_runs` refuses.
    """
    groups = group_runs(read_runs(places))
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
    """Metrics of quality first, then those of training curves, then the rest."""
    return (not better_direction(name), name.startswith("val/"))


def _compare_metric(name: str, groups: Sequence[Group]) -> Row:
    sides = [(group.label, group.of(name), group.enough_seeds(name)) for group in groups]
    estimates = [
        statistics.estimate(metrics, enough_seeds=enough) if metrics and not differing_settings(metrics) else None
        for _, metrics, enough in sides
    ]
    (first, held, enough), *others = sides
    verdicts = [
        statistics.compare_groups(name, held, metrics, (first, label), enough_seeds=enough and enough_too)
        for label, metrics, enough_too in others
    ]
    return Row(name, {1: "higher", -1: "lower", 0: None}[better_direction(name)], estimates, verdicts)


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """Groups in the order of their first runs, labelled A, B, C and so on."""
    found: dict[str, list[RunRecord]] = {}
    for run in runs:
        config = {key: value for key, value in run.options.items() if key != "seed"}
        key = json.dumps([config, [run.facts.get(fact) for fact in IDENTITY]], sort_keys=True, default=str)
        found.setdefault(key, []).append(run)
    labels = [chr(65 + i) if i < 26 else f"G{i + 1}" for i in range(len(found))]
    return [Group(label, members) for label, members in zip(labels, found.values(), strict=True)]


def config_differences(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Config keys and facts that are not the same in all groups, or in all runs of the only one."""
    described = [[_describe(run) for run in group.runs] for group in groups]
    runs = [run for group in described for run in group]
    found: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for run in runs for key in run):
        by_group = [", ".join(dict.fromkeys(run.get(key, "-") for run in group)) for group in described]
        if len(set(by_group)) > 1 or len({run.get(key) for run in runs}) > 1 == len(groups):
            found[key] = by_group
    return found


def _describe(run: RunRecord) -> dict[str, str]:
    """What may differ between runs, as short texts."""
    told = {key: value for key, value in run.options.items() if key != "seed" and not key.endswith(OF_HYDRA)}
    # an option and the constructor that it is interpolated into: optimizer.lr, optimizer.build.lr
    told = {key: value for key, value in told.items() if ".build." not in key or key.replace("build.", "") not in told}
    made = {key: value for key, value in run.facts.items() if key in FACTS or key.startswith("versions.")}
    return {key: _short_value(key, value) for key, value in {**told, "seed": run.seed, **made}.items()}


def _short_value(key: str, value: Any) -> str:
    text = str(value)
    if key.endswith("_target_"):
        return text.rpartition(".")[2]
    return text[:12] if re.fullmatch(r"[0-9a-f]{40,}", text) else text


def _notes(groups: Sequence[Group], rows: Sequence[Row]) -> Iterator[str]:
    """What to know before a verdict is believed; docs/reading_the_numbers.md says what it means."""
    differences = [verdict.difference for row in rows if row.better for verdict in row.verdicts]
    if any(found is not None and found.of == statistics.SAMPLING for found in differences):
        yield f"{statistics.SAMPLING}: another seed may move a metric further; three seeds a group would tell."
    for i, group in enumerate(groups[1:]):
        found = {row.metric: row.verdicts[i] for row in rows if row.better}
        tests = {name: one.difference.p_value for name, one in found.items() if one.difference is not None}
        known = {name: value for name, value in tests.items() if value is not None}
        real = [f"{name.replace('_', ' ')} ({found[name].verdict})" for name in statistics.holm(known)]
        said = f"a difference in {', '.join(real)}" if real else "within noise"
        together = f"{group.label} beside {groups[0].label}, all {len(known)} figures together (Holm's test, 5 %)"
        if known:
            yield f"{together}: {said}."
    runs = [run for group in groups for run in group.runs]
    concerns = {
        "Not at the end of their training": [run for run in runs if not run.finished],
        "Curves that end in no number and are not judged": [
            run for run in runs if not all(math.isfinite(values[-1]) for _, values in run.curves.values())
        ],
        "Trained on since they were evaluated, to be evaluated again (tools/evaluate.py)": [r for r in runs if r.stale],
        "Without an evaluation (tools/evaluate.py)": [run for run in runs if not run.evaluation],
    }
    for concern, of in concerns.items():
        if of:
            yield f"{concern}: {', '.join(run.place for run in of)}."
