"""Statistical comparison of two groups of runs: is one better in a metric, or is the difference within noise?

The runs of a group differ only in their seed. The rules for each metric, at 95% confidence:

1. Metrics measured with different settings (features, N, reference set, sampler, guidance) are not compared.
2. If both groups contain at least three runs with distinct seeds, the test is Welch's t test on the runs. The spread
   between seeds includes both training and sampling noise.
3. Otherwise, or if a metric has the same value for all seeds, the test uses the standard errors of the evaluations.
   These errors cover only sampling noise. A different training seed can change a metric by more, and the verdict says
   so. All runs of a group are measured on the same images, so the error of their mean is not divided by the square
   root of the number of runs. The errors of the two groups are treated as independent, so the confidence interval is
   conservative.
4. Without standard errors, the verdict is `noise unknown`.
5. If the confidence interval of the difference excludes 0, the verdict is `better`, or `differ` if the metric has no
   better direction. If it includes 0, the verdict is `within noise`. This does not prove that the groups are equal: any
   difference inside the interval remains possible.

Verdicts are not corrected for multiple comparisons: among twenty metrics without a true difference, one is expected to
appear significant. `holm` returns the metrics that remain significant after correction.
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
MIN_SEEDS = 3
SEEDS, SAMPLING = "between seeds", "sampling noise only"
HIGHER = frozenset({"psnr", "ssim", "retrieval", "cosine", "precision", "recall", "density", "coverage", "accuracy"})
LOWER = frozenset({"kd", "fd", "fid", "kid", "cmmd", "loss", "lpips", "bits", "l1", "mse", "shift"})
"""Words in the names of metrics for which higher (HIGHER) or lower (LOWER) values are better."""
NEITHER = frozenset({"kl", "chance", "permuted", "validation", "floor", "pca", "classifier"})
"""Words in the names of metrics with no better direction: rates, and baselines that depend only on the data."""


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference of means, with its confidence interval. Field names are keys in compare.json."""

    mean: float
    runs: int
    of: str | None = None
    """Source of noise covered by the interval, SEEDS or SAMPLING; None if unknown."""
    dof: float | None = None
    """Degrees of freedom; None for a normal distribution."""
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    """p-value of the two-sided t test against 0."""


@dataclass(frozen=True)
class Verdict:
    """The result of comparing one metric between two groups. Field names are keys in compare.json."""

    groups: tuple[str, str]
    verdict: str
    difference: Estimate | None = None
    """Second group minus first group; None if they are not comparable."""


def better_direction(name: str) -> int:
    """Return 1 if higher values of a metric are better, -1 if lower values are better, and 0 if neither is."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if words & NEITHER:
        return 0
    return int(bool(words & HIGHER)) - int(bool(words & LOWER))


def estimate(*groups: Sequence[Metric], enough_seeds: bool) -> Estimate:
    """Estimate the mean of one group, or the difference between the means of two groups, second minus first.

    Args:
        enough_seeds: True if each group has at least MIN_SEEDS runs with distinct seeds.
    """
    values = [[metric.value for metric in group] for group in reversed(groups)]
    mean = fmean(values[0]) - (fmean(values[1]) if len(groups) > 1 else 0.0)
    runs = sum(map(len, groups))
    if enough_seeds and any(len(set(group)) > 1 for group in values):
        # scipy warns if all values of a group are equal
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
            test = stats.ttest_ind(*values, equal_var=False) if len(groups) > 1 else stats.ttest_1samp(values[0], 0)
        low, high = test.confidence_interval(CONFIDENCE)
        return Estimate(mean, runs, SEEDS, float(test.df), (float(low), float(high)), float(test.pvalue))
    if any(metric.standard_error is None for group in groups for metric in group):
        return Estimate(mean, runs)
    variances = [fmean((metric.standard_error or 0.0) ** 2 for metric in group) for group in groups]
    error = math.sqrt(sum(variances))
    if not error:
        return Estimate(mean, runs, SAMPLING, None, (mean, mean), float(not mean))
    # Welch-Satterthwaite degrees of freedom. Source: Welch 1947, Biometrika 34(1-2)
    terms = sum(variance**2 / group[0].dof for variance, group in zip(variances, groups, strict=True))
    noise = stats.t(error**4 / terms, scale=error) if terms else stats.norm(scale=error)
    margin, p_value = float(noise.ppf((1 + CONFIDENCE) / 2)), float(2 * noise.sf(abs(mean)))
    return Estimate(mean, runs, SAMPLING, error**4 / terms if terms else None, (mean - margin, mean + margin), p_value)


def compare_groups(
    name: str, baseline: Sequence[Metric], candidate: Sequence[Metric], labels: tuple[str, str], *, enough_seeds: bool
) -> Verdict:
    """Compare one metric between two groups, following the rules of this module.

    Args:
        labels: Labels of the groups, used in the verdict `<label> better`.
        enough_seeds: True if both groups have at least MIN_SEEDS runs with distinct seeds.
    """
    if missing := [label for label, group in zip(labels, (baseline, candidate), strict=True) if not group]:
        return Verdict(labels, f"not in {' and '.join(missing)}")
    if differing := differing_settings([*baseline, *candidate]):
        return Verdict(labels, f"not comparable: {', '.join(differing)}")
    difference, direction = estimate(baseline, candidate, enough_seeds=enough_seeds), better_direction(name)
    if difference.interval is None:
        return Verdict(labels, "noise unknown", difference)
    if difference.interval[0] <= 0 <= difference.interval[1]:
        return Verdict(labels, "within noise", difference)
    if not direction:
        return Verdict(labels, "differ", difference)
    return Verdict(labels, f"{labels[1] if difference.mean * direction > 0 else labels[0]} better", difference)


def holm(p_values: Mapping[str, float]) -> list[str]:
    """Return the names of the metrics that remain significant after the Holm-Bonferroni correction.

    The probability of at least one false positive is at most 5%, regardless of how the metrics depend on each other.

    Source: Holm 1979, Scandinavian Journal of Statistics 6(2).
    """
    significant: list[str] = []
    for name in sorted(p_values, key=p_values.__getitem__):
        if p_values[name] > (1 - CONFIDENCE) / (len(p_values) - len(significant)):
            break
        significant.append(name)
    return significant


def differing_settings(metrics: Sequence[Metric]) -> list[str]:
    """Return the names of the settings that differ between metrics or are missing from some of them.

    Sampler options other than the method are allowed to be missing, because samplers have different options.
    """
    differing = []
    for key in dict.fromkeys(key for metric in metrics for key in metric.settings):
        values = [metric.settings[key] for metric in metrics if key in metric.settings]
        optional = key.startswith("sampler.") and key != "sampler.method"
        if any(value != values[0] for value in values) or (len(values) < len(metrics) and not optional):
            differing.append(key)
    return differing
