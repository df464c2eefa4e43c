"""A metric: one number of a run, and how far chance may have moved it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """A number with its standard error, where that is known."""

    value: float
    standard_error: float | None = None
    """Of drawing other images, not of training again."""
    dof: float = math.inf
    """Degrees of freedom of the standard error."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How it was measured: metrics compare where these are equal."""

    @property
    def is_measured(self) -> bool:
        return not math.isnan(self.value)

    def __format__(self, spec: str) -> str:
        """`f"{metric:.3f}"` is value +- standard error, each by the format; - where it was not measured."""
        return f"{self.value:{spec}} +- {self.standard_error:{spec}}" if self.is_measured else "-"


UNMEASURED = Metric(math.nan)
"""A metric for which there are too few images, or no network."""


def mean_metric(values: Tensor) -> Metric:
    """Mean and its standard error between images (nan for a single one)."""
    n = len(values)
    return Metric(values.mean().item(), values.std().item() / n**0.5 if n > 1 else math.nan)


ERROR = "_standard_error"
"""Ends the key of a metric's error in a JSON."""


def metrics_to_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """Write every Metric among the values as two keys, null where it was not measured; leave other values alone."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Metric):
            found[name] = value.value if value.is_measured else None
            found[name + ERROR] = value.standard_error
        else:
            found[name] = value
    return found


def share_error(share: float, num: int) -> float:
    """Standard error of a share of `num`, with one success and one failure added, so that 0 and 1 have one as well.

    Source: Agresti and Caffo 2000, The American Statistician 54(4).
    """
    moved = (share * num + 1) / (num + 2)
    return math.sqrt(moved * (1 - moved) / (num + 2))
