"""Reading evaluation.json: the keys `<name>` and `<name>_standard_error` of each metric, and the shared settings."""

import math
from collections.abc import Mapping
from typing import Any

from ldm.metrics.metric import ERROR_SUFFIX, Metric, proportion_error
from ldm.metrics.subsets import NUM_GROUPS, NUM_SUBSETS
from ldm.tracking.run import flatten

SETTINGS: tuple[str, ...] = (
    "features",
    "features_key",
    "num_samples",
    "num_images",
    "images",
    "reference",
    "num_reference",
)
SETTINGS += ("fd_components", "features_in_loss", "lpips_in_loss", "guidance", "guidance_interval", "sampler")
NON_METRICS = ("seed", "factor", "feature_dim", "seconds", "kl_nats", "codebook_size", "val_images")
"""Numbers that are not metrics of a model."""
PIXEL_METRICS = ("psnr", "ssim", "lpips", "kl", "codebook", "pca")
"""First words of metrics that do not depend on the feature network."""
WITHOUT_SAMPLER = ("reconstructions", "validation", "vae", "floor", "chance")
"""Last words of metrics that do not depend on samples."""
BY_SUBSETS = ("kd", "precision", "recall", "density", "coverage", "cmmd")
BY_JACKKNIFE = ("fd", "class_shift")
DOF = dict.fromkeys(BY_SUBSETS, NUM_SUBSETS - 1) | dict.fromkeys(BY_JACKKNIFE, NUM_GROUPS - 1)
"""Degrees of freedom by name prefix. Standard errors are computed over subsets or over jackknife groups."""


def metrics_from_json(content: Mapping[str, Any]) -> dict[str, Metric]:
    """Read the metrics of an evaluation, each with its standard error and the settings that it depends on."""
    return {name: _read_metric(name, value, content) for name, value in finite_numbers(content).items()}


def finite_numbers(content: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of the metrics by name, without settings, counts and standard errors."""
    return {
        name: float(value)
        for name, value in content.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if name not in (*SETTINGS, *NON_METRICS) and not name.startswith("num_") and not name.endswith(ERROR_SUFFIX)
    }


def _read_metric(name: str, value: float, content: Mapping[str, Any]) -> Metric:
    first, last = name.split("_")[0], name.split("_")[-1]
    pixel_settings = {"images", "num_images", "num_samples", *({"lpips_in_loss"} if first == "lpips" else ())}
    settings = {
        key: content[key]
        for key in SETTINGS
        if content.get(key) is not None
        and (key in pixel_settings if first in PIXEL_METRICS else key != "lpips_in_loss")
        and (key != "fd_components" or first == "fd")
        and not (last in WITHOUT_SAMPLER and key.startswith(("guidance", "sampler")))
    }
    error = content.get(name + ERROR_SUFFIX)
    dof: float = next((dof for prefix, dof in DOF.items() if name.startswith(f"{prefix}_")), math.inf)
    if error is None and first == "retrieval" and last != "chance":
        # there are as many images as samples, unless the file states a smaller number
        num = content.get("num_held_out" if "_held_out_" in name else f"num_{last}")
        error = proportion_error(value, num or content["num_samples"])
    return Metric(value, error, dof, flatten(settings))
