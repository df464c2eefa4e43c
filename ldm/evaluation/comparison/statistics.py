"""Is one group of runs better in a metric than another, or is the difference noise?

A group is what differs in nothing but its seed. The rule, per metric, everything at 95 %:

1. Metrics that were not measured alike (features, N, reference set, sampler, guidance) get no verdict.
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
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

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
    """A mean, or a difference of means, and how far noise may have moved it. Its fields are keys of compare.json."""

    mean: float
    runs: int
    of: str | None = None
    """SEEDS or SAMPLING: what the interval is of; None where the noise is not known."""
    dof: float | None = None
    """Degrees of freedom; None of a normal distribution."""
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    """Of the two-sided t test against 0."""


@dataclass(frozen=True)
class Verdict:
    """What is said of two groups in one metric. Its fields are keys of compare.json."""

    groups: tuple[str, str]
    verdict: str
    difference: Estimate | None = None
    """Of the second from the first; None where they do not compare."""


def better_direction(name: str) -> int:
    """Return 1 where a higher metric is better, -1 where a lower one is, 0 where its name does not say."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if words & NEITHER:
        return 0
    return int(bool(words & HIGHER)) - int(bool(words & LOWER))


def estimate(*sides: Sequence[Metric], enough_seeds: bool) -> Estimate:
    """The mean of one group, or by how much the mean of the second is above that of the first.

    Args:
        enough_seeds: Each side has FEWEST_SEEDS or more runs, with seeds of their own.
    """
    values = [[metric.value for metric in side] for side in reversed(sides)]
    mean = fmean(values[0]) - (fmean(values[1]) if len(sides) > 1 else 0.0)
    runs = sum(map(len, sides))
    if enough_seeds and any(len(set(side)) > 1 for side in values):
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # one side's runs may be all the same
            test = stats.ttest_ind(*values, equal_var=False) if len(sides) > 1 else stats.ttest_1samp(values[0], 0)
        low, high = test.confidence_interval(CONFIDENCE)
        return Estimate(mean, runs, SEEDS, float(test.df), (float(low), float(high)), float(test.pvalue))
    if any(metric.standard_error is None for side in sides for metric in side):
        return Estimate(mean, runs)
    variances = [fmean((metric.standard_error or 0.0) ** 2 for metric in side) for side in sides]
    error = math.sqrt(sum(variances))
    if not error:
        return Estimate(mean, runs, SAMPLING, None, (mean, mean), float(not mean))
    # the degrees of freedom of Welch and Satterthwaite. Source: Welch 1947, Biometrika 34(1-2)
    rest = sum(variance**2 / side[0].dof for variance, side in zip(variances, sides, strict=True))
    noise = stats.t(error**4 / rest, scale=error) if rest else stats.norm(scale=error)
    width, p_value = float(noise.ppf((1 + CONFIDENCE) / 2)), float(2 * noise.sf(abs(mean)))
    return Estimate(mean, runs, SAMPLING, error**4 / rest if rest else None, (mean - width, mean + width), p_value)


def compare_groups(
    name: str, first: Sequence[Metric], second: Sequence[Metric], labels: tuple[str, str], *, enough_seeds: bool
) -> Verdict:
    """The rule of this module, for one metric of two groups.

    Args:
        labels: Of the groups, for `<label> better`.
        enough_seeds: Both have FEWEST_SEEDS or more runs, with seeds of their own.
    """
    if lacking := [label for label, side in zip(labels, (first, second), strict=True) if not side]:
        return Verdict(labels, f"not in {' and '.join(lacking)}")
    if unlike := differing_settings([*first, *second]):
        return Verdict(labels, f"not comparable: {', '.join(unlike)}")
    found, way = estimate(first, second, enough_seeds=enough_seeds), better_direction(name)
    if found.interval is None:
        return Verdict(labels, "noise unknown", found)
    if found.interval[0] <= 0 <= found.interval[1]:
        return Verdict(labels, "within noise", found)
    if not way:
        return Verdict(labels, "differ", found)
    return Verdict(labels, f"{labels[1] if found.mean * way > 0 else labels[0]} better", found)


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
