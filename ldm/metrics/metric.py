"""Measured values with standard errors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """A value with its standard error, if known."""

    value: float
    standard_error: float | None = None
    """Covers the sampling noise of the images, but not the variation between training runs."""
    dof: float = math.inf
    """Degrees of freedom of the standard error."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How the value was measured. Metrics are comparable only if their settings are equal."""

    @property
    def is_measured(self) -> bool:
        return not math.isnan(self.value)

    def __format__(self, spec: str) -> str:
        """Return "value +- standard error", both formatted with `spec`, or "-" if the metric was not measured."""
        return f"{self.value:{spec}} +- {self.standard_error:{spec}}" if self.is_measured else "-"


UNMEASURED = Metric(math.nan)
"""A metric that could not be measured, because there are too few images or there is no feature network."""


def mean_metric(values: Tensor) -> Metric:
    """Return the mean over images and its standard error (nan for a single image)."""
    n = len(values)
    return Metric(values.mean().item(), values.std().item() / n**0.5 if n > 1 else math.nan)


ERROR_SUFFIX = "_standard_error"
"""Suffix of the keys of standard errors in JSON files."""


def metrics_to_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """Replace each Metric with two entries: the value (None if not measured) and the standard error."""
    values: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Metric):
            values[name] = value.value if value.is_measured else None
            values[name + ERROR_SUFFIX] = value.standard_error
        else:
            values[name] = value
    return values


def proportion_error(proportion: float, num_trials: int) -> float:
    """Return the standard error of a proportion estimated from `num_trials` trials.

    One success and one failure are added, so that the error is not 0 for the proportions 0 and 1.

    Source: Agresti and Caffo 2000, The American Statistician 54(4).
    """
    adjusted = (proportion * num_trials + 1) / (num_trials + 2)
    return math.sqrt(adjusted * (1 - adjusted) / (num_trials + 2))
