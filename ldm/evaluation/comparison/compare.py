"""Runs beside each other: what differs between them, their metrics by group, and which of them are better."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.evaluation.comparison.runs import RunRecord, read_runs
from ldm.evaluation.comparison.statistics import (
    CONFIDENCE,
    FEWEST_SEEDS,
    SAMPLING,
    SEEDS,
    Estimate,
    Verdict,
    better_direction,
    compare_groups,
    differing_settings,
    estimate_from_sampling,
    estimate_mean,
    holm,
)
from ldm.metrics.metric import Metric
from ldm.runtime import shell

IDENTITY = ("data_fingerprint", "contract.autoencoder_sha256", "precision")
"""Facts that the runs of a group share, as they share their configs."""
FACTS = ("seed", "data", *IDENTITY, "commit", "python", "machine", "system")
ABSENT = "-"
OF_HYDRA = ("_partial_", "_convert_")


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed."""

    label: str
    runs: list[RunRecord]

    @property
    def title(self) -> str:
        more = f" and {len(self.runs) - 1} more" if len(self.runs) > 1 else ""
        return f"{self.label}: {self.runs[0].name}{more}"

    def of(self, metric: str) -> list[Metric]:
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]

    def enough_seeds(self, metric: str) -> bool:
        """Of the runs that have the metric: as many as a spread needs, and no seed twice."""
        seeds = [str(run.seed) for run in self.runs if metric in run.metrics]
        return len(seeds) >= FEWEST_SEEDS and len(set(seeds)) == len(seeds)


@dataclass(frozen=True)
class Row:
    """One metric in every group, and what is said of each group but the first beside the first."""

    metric: str
    way: int
    estimates: list[Estimate | None]
    verdicts: list[Verdict]


@dataclass(frozen=True)
class Comparison:
    """All that is found out without drawing an image."""

    groups: list[Group]
    differences: dict[str, list[str]]
    """By key, the value of each group."""
    rows: list[Row]
    equal: dict[str, float]
    """Figures that are the same in every run."""
    notes: list[str]

    @property
    def runs(self) -> list[tuple[Group, RunRecord]]:
        return [(group, run) for group in self.groups for run in group.runs]

    def content(self) -> dict[str, Any]:
        """For compare.json."""
        of_runs = [
            {"group": group.label, "run": run.place, "name": run.name, "stage": run.stage, "seed": run.seed}
            | {"figures": {name: _metric_content(metric) for name, metric in run.metrics.items()}}
            for group, run in self.runs
        ]
        of_rows = [
            {
                "metric": row.metric,
                "better": {1: "higher", -1: "lower", 0: None}[row.way],
                "groups": [None if found is None else found.content() for found in row.estimates],
                "verdicts": [
                    {"groups": [self.groups[0].label, group.label], **verdict.content()}
                    for group, verdict in zip(self.groups[1:], row.verdicts, strict=True)
                ],
            }
            for row in self.rows
        ]
        known = {"confidence": CONFIDENCE, "runs": of_runs, "differences": self.differences}
        return {**known, "figures": of_rows, "equal": self.equal, "notes": self.notes}


def compare_runs(places: Sequence[str]) -> Comparison:
    """Read, group and judge runs; the first group is the one that the others are held against.

    Args:
        places: Folders, or `entity/project/run` of W&B.

    Raises:
        UserError: what `read_runs` refuses.
    """
    groups = group_runs(read_runs(places))
    names = dict.fromkeys(name for group in groups for run in group.runs for name in run.metrics)
    rows, equal, members = [], {}, sum(len(group.runs) for group in groups)
    for name in sorted(names, key=_row_order):
        metrics = [group.of(name) for group in groups]
        values = [metric.value for found in metrics for metric in found]
        if len(values) == members and len(set(values)) == 1:
            equal[name] = values[0]
            continue
        verdicts = [_group_verdict(name, groups[0], other) for other in groups[1:]]
        estimates = [
            estimate_mean(found, enough_seeds=group.enough_seeds(name))
            if found and not differing_settings(found)
            else None
            for group, found in zip(groups, metrics, strict=True)
        ]
        rows.append(Row(name, better_direction(name), estimates, verdicts))
    return Comparison(groups, config_differences(groups), rows, equal, list(_notes(groups, rows)))


def _metric_content(metric: Metric) -> dict[str, Any]:
    interval = estimate_from_sampling([metric]).interval()
    known = {"value": metric.value, "standard_error": metric.standard_error, "interval": interval}
    return {**known, "settings": dict(metric.settings)}


def _group_verdict(name: str, first: Group, other: Group) -> Verdict:
    lacking = [group.label for group in (first, other) if not group.of(name)]
    if lacking:
        return Verdict(f"not in {' and '.join(lacking)}", None)
    enough = first.enough_seeds(name) and other.enough_seeds(name)
    return compare_groups(name, first.of(name), other.of(name), (first.label, other.label), enough_seeds=enough)


def _row_order(name: str) -> tuple[bool, bool]:
    """Figures of quality first, then those of training curves, then the rest."""
    return (not better_direction(name), name.startswith("val/"))


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """Groups in the order of their first runs, labelled A, B, C and so on."""
    found: dict[str, list[RunRecord]] = {}
    for run in runs:
        config = {key: value for key, value in run.config.items() if key != "seed"}
        key = json.dumps([config, [run.facts.get(fact) for fact in IDENTITY]], sort_keys=True, default=str)
        found.setdefault(key, []).append(run)
    labels = [chr(65 + i) if i < 26 else f"G{i + 1}" for i in range(len(found))]
    return [Group(label, members) for label, members in zip(labels, found.values(), strict=True)]


def config_differences(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Config keys and facts that are not the same in all runs, with their values by group."""
    runs = [run for group in groups for run in group.runs]
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "seed" and not key.endswith(OF_HYDRA))
    unlike: dict[str, list[str]] = {}
    seen: set[tuple[str, ...]] = set()
    for key in sorted(keys, key=lambda key: key.count(".")):
        values = [_short_value(key, run.config.get(key, ABSENT)) for run in runs]
        # an option and the constructor that it is interpolated into: optimizer.lr, optimizer.build.lr
        repeated = (key.split(".")[0], key.split(".")[-1], *values)
        whole = any(other.startswith(f"{key}.") for other in keys)  # null here, an object of several keys there
        if len(set(values)) > 1 and repeated not in seen and not whole:
            unlike[key] = values
            seen.add(repeated)
    found = {key: _by_group(groups, unlike[key]) for key in keys if key in unlike}
    versions = dict.fromkeys(key for run in runs for key in run.facts if key.startswith("versions."))
    for key in (*FACTS, *versions):
        values = [_short_value(key, run.facts.get(key, ABSENT)) for run in runs]
        shown = _by_group(groups, values)
        if len(set(values)) > 1 and (key != "seed" or len(groups) == 1 or len(set(shown)) > 1):
            found[key] = shown
    return found


def _by_group(groups: Sequence[Group], values: Sequence[str]) -> list[str]:
    rest = iter(values)
    return [", ".join(dict.fromkeys(next(rest) for _ in group.runs)) for group in groups]


def _short_value(key: str, value: Any) -> str:
    text = str(value)
    if key.endswith("_target_"):
        return text.rpartition(".")[2]
    return text[:12] if re.fullmatch(r"[0-9a-f]{40,}", text) else text


def _evaluation_of(places: Sequence[str]) -> str:
    """The command that evaluates the first of these runs that lies on this machine."""
    return shell.tool_command("evaluate", f"run={next((place for place in places if Path(place).is_dir()), 'RUN')}")


def _first_three(places: Sequence[str]) -> str:
    return ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")


def _notes(groups: Sequence[Group], rows: Sequence[Row]) -> Iterator[str]:
    """What to know before a verdict is believed."""
    runs = [run for group in groups for run in group.runs]
    differences = [verdict.difference for row in rows if row.way for verdict in row.verdicts]
    noise = [found.noise for found in differences if found is not None and found.noise is not None]
    if len(groups) == 1:
        yield "These runs differ in nothing but their seed: their spread is shown, and there is nothing to judge."
    if SEEDS in noise:
        yield f"{SEEDS}: 95 % t intervals over the runs of a group; differences by Welch's t test."
    if SAMPLING in noise:
        yield (
            f"{SAMPLING}: 95 % intervals from the standard errors of the evaluations. Another seed of training may "
            f"move a figure further; {FEWEST_SEEDS} seeds a group would tell: train each again with -m seed=0,1,2."
        )
    for i, group in enumerate(groups[1:]):
        found = {row.metric: row.verdicts[i] for row in rows if row.way}
        tests = {name: one.difference.p_value for name, one in found.items() if one.difference is not None}
        known = {name: value for name, value in tests.items() if value is not None}
        real = [f"{name.replace('_', ' ')} ({found[name].text})" for name in holm(known)]
        if known:
            yield (
                f"{group.label} beside {groups[0].label}, all {len(known)} figures together (Holm's test, 5 %): "
                + (f"a difference in {', '.join(real)}." if real else "within noise.")
            )
    if noise:
        yield (
            f"{len(noise)} verdicts, not corrected for their number: where nothing differs, about "
            f"{(1 - CONFIDENCE) * len(noise):.1f} of them claim that it does. `within noise` is no proof of equality: "
            "a difference as large as the interval may hide in it."
        )
    if unfinished := [run.place for run in runs if not run.finished]:
        yield f"Not at the end of their training, with the figures of now: {_first_three(unfinished)}."
    if diverged := [f"{run.place} ({', '.join(run.diverged)})" for run in runs if run.diverged]:
        yield f"Diverged, so that no such figure is judged: {_first_three(diverged)}."
    if stale := [run.place for run in runs if run.stale]:
        yield (
            f"Trained on since they were evaluated, so that those figures are left out: {_first_three(stale)}. "
            f"Evaluate again: {_evaluation_of(stale)}"
        )
    if doubtful := [run.place for run in runs if run.doubtful]:
        yield f"Their evaluations do not say of which weights they are: {_first_three(doubtful)}."
    if without := [
        run.place
        for run in runs
        if not run.stale
        and not any(f.settings.get("reference") or f.settings.get("images") for f in run.metrics.values())
    ]:
        yield f"Without an evaluation: {_first_three(without)}. Make one: {_evaluation_of(without)}"
    for group in groups:
        names = dict.fromkeys(name for run in group.runs for name in run.metrics)
        unlike = {setting: None for name in names for setting in differing_settings(group.of(name))}
        if unlike:
            yield f"The runs of {group.label} were not measured alike ({', '.join(unlike)}): no mean of those figures."
    seeds = {str(run.evaluation_seed) for run in runs if run.evaluation_seed is not None}
    if len(seeds) > 1:
        yield f"Evaluated with different seeds ({', '.join(sorted(seeds))}): not on the same images or captions."
    twice = [group.label for group in groups if len({str(run.seed) for run in group.runs}) < len(group.runs)]
    if twice:
        yield f"A seed stands twice in {', '.join(twice)}: not independent runs, so that no spread of seeds is taken."
