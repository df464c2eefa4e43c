"""Is one group of runs better in a metric than another, or is the difference noise?

A group is what differs in nothing but its seed. The rule, per metric, everything at 95 %:

1. Figures that were not measured alike (features, N, reference set, sampler, guidance) get no verdict.
2. Three or more runs with seeds of their own in both groups: Welch's t test on the runs. Their spread holds all that a
   seed moves, training and sampling.
3. Otherwise, and where seeds do not move a metric, the standard errors of the evaluations. They hold the noise of
   sampling alone: another seed of training may move a metric further, and the verdict says so. The runs of a group are
   measured on the same images, so that the mean's error is taken to be theirs, not smaller by the root of their number;
   and two groups as if on images of their own, which makes the interval of a difference too wide rather than too
   narrow.
4. No standard error at all: no verdict.
5. `better` where the interval of the difference leaves out 0 and it is known which way is better; else `within noise`,
   which is no proof of equality: the interval says how large a difference could hide in it.

Verdicts are not corrected for their number: of twenty metrics without any difference, one is expected to look real.
`holm` says which of them do so all together.
"""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from ldm.metrics.metric import Metric

CONFIDENCE = 0.95
FEWEST_SEEDS = 3
SEEDS, SAMPLING = "between seeds", "sampling noise only"
HIGHER = frozenset({"psnr", "ssim", "retrieval", "cosine", "precision", "recall", "density", "coverage", "accuracy"})
LOWER = frozenset({"kd", "fd", "fid", "kid", "cmmd", "loss", "lpips", "bits", "l1", "mse", "shift"})
"""Words of a metric's name that say which way is better."""
NEITHER = frozenset({"kl", "chance", "permuted", "validation", "floor", "pca", "classifier"})
"""Words of a rate, which is worth nothing without its distortion, and of the anchors, which are of the data."""


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of means, and how far noise may have moved it."""

    mean: float
    standard_error: float | None
    dof: float
    noise: str | None
    """SEEDS, SAMPLING or None: what the standard error holds."""
    num_runs: int

    @property
    def half_width(self) -> float | None:
        """t(0.975, dof) times the standard error. Source: Student 1908, Biometrika 6(1)."""
        if self.standard_error is None:
            return None
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, self.dof)) * self.standard_error if self.standard_error else 0.0

    @property
    def p_value(self) -> float | None:
        """Of the two-sided t test against 0; None where the noise is not known."""
        if self.standard_error is None:
            return None
        if not self.standard_error:
            return float(not self.mean)
        return float(2 * stats.t.sf(abs(self.mean) / self.standard_error, self.dof))

    def interval(self) -> list[float] | None:
        width = self.half_width
        return None if width is None else [self.mean - width, self.mean + width]

    def content(self) -> dict[str, Any]:
        """For compare.json, which knows no infinity."""
        dof = self.dof if math.isfinite(self.dof) else None
        return {"mean": self.mean, "interval": self.interval(), "of": self.noise, "dof": dof, "runs": self.num_runs}


@dataclass(frozen=True)
class Verdict:
    """What is said of two groups in one metric."""

    text: str
    difference: Estimate | None
    """Of the second from the first; None where they do not compare."""

    def content(self) -> dict[str, Any]:
        """For compare.json."""
        return {"verdict": self.text, "difference": None if self.difference is None else self.difference.content()}


def better_direction(name: str) -> int:
    """Return 1 where a higher metric is better, -1 where a lower one is, 0 where its name does not say."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if words & NEITHER:
        return 0
    return int(bool(words & HIGHER)) - int(bool(words & LOWER))


def estimate_from_seeds(metrics: Sequence[Metric]) -> Estimate:
    """The mean over runs of different seeds, with s / sqrt(n) and n - 1 degrees of freedom."""
    values = [metric.value for metric in metrics]
    n, variance = len(values), statistics.variance(values)  # exact: 0 where all are the same
    return Estimate(statistics.mean(values), math.sqrt(variance / n), n - 1, SEEDS, n)


def estimate_from_sampling(metrics: Sequence[Metric]) -> Estimate:
    """The mean over runs, with the root mean square of their standard errors."""
    mean = statistics.mean(metric.value for metric in metrics)
    errors = [metric.standard_error for metric in metrics if metric.standard_error is not None]
    if len(errors) < len(metrics):
        return Estimate(mean, None, math.inf, None, len(metrics))
    error = math.sqrt(math.fsum(error**2 for error in errors) / len(errors))
    return Estimate(mean, error, min(metric.dof for metric in metrics), SAMPLING, len(metrics))


def estimate_mean(metrics: Sequence[Metric], *, enough_seeds: bool) -> Estimate:
    """Of one group: between seeds where there are enough and they move the metric, of sampling otherwise."""
    if enough_seeds and (found := estimate_from_seeds(metrics)).standard_error:
        return found
    return estimate_from_sampling(metrics)


def estimate_difference(first: Estimate, second: Estimate) -> Estimate:
    """second - first, with the degrees of freedom of Welch and Satterthwaite.

        v = (v_1 + v_2)^2 / (v_1^2 / d_1 + v_2^2 / d_2),   v_i = squared standard error, d_i = its degrees of freedom

    Source: Welch 1947, Biometrika 34(1-2).
    """
    apart, num_runs = second.mean - first.mean, first.num_runs + second.num_runs
    if first.standard_error is None or second.standard_error is None:
        return Estimate(apart, None, math.inf, None, num_runs)
    parts = (first.standard_error**2, second.standard_error**2)
    rest = math.fsum(part**2 / side.dof for part, side in zip(parts, (first, second), strict=True))
    dof = sum(parts) ** 2 / rest if rest else math.inf
    return Estimate(apart, math.sqrt(sum(parts)), dof, first.noise, num_runs)


def compare_groups(
    name: str, first: Sequence[Metric], second: Sequence[Metric], labels: tuple[str, str], *, enough_seeds: bool
) -> Verdict:
    """The rule of this module, for one metric of two groups.

    Args:
        labels: Of the groups, for `<label> better`.
        enough_seeds: Both have FEWEST_SEEDS or more runs, with seeds of their own.
    """
    if unlike := differing_settings([*first, *second]):
        return Verdict(f"not comparable: {', '.join(unlike)}", None)
    sides = [estimate_mean(side, enough_seeds=enough_seeds) for side in (first, second)]
    if sides[0].noise != sides[1].noise:
        sides = [
            estimate_from_seeds(side) if enough_seeds else estimate_from_sampling(side) for side in (first, second)
        ]
    found = estimate_difference(*sides)
    width, way = found.half_width, better_direction(name)
    if width is None:
        return Verdict("noise unknown", found)
    if abs(found.mean) <= width:
        return Verdict("within noise", found)
    if not way:
        return Verdict("differ", found)
    return Verdict(f"{labels[1] if found.mean * way > 0 else labels[0]} better", found)


def holm(p_values: Mapping[str, float]) -> list[str]:
    """Names of the differences that hold together: one or more of them without any difference in 5 % of cases at most,
    however the metrics depend on each other.

    Source: Holm 1979, Scandinavian Journal of Statistics 6(2).
    """
    found: list[str] = []
    for name in sorted(p_values, key=p_values.__getitem__):
        if p_values[name] > (1 - CONFIDENCE) / (len(p_values) - len(found)):
            break
        found.append(name)
    return found


def differing_settings(metrics: Sequence[Metric]) -> list[str]:
    """Names of the settings that are not the same for all; one that somebody does not state is not the same.

    The options of a sampler may be left to their defaults: its method decides which there are.
    """
    found = []
    for key in dict.fromkeys(key for metric in metrics for key in metric.settings):
        stated = [metric.settings[key] for metric in metrics if key in metric.settings]
        optional = key.startswith("sampler.") and key != "sampler.method"
        if any(value != stated[0] for value in stated) or (len(stated) < len(metrics) and not optional):
            found.append(key)
    return found
