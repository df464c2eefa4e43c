"""Metrics in evaluation.json: the keys `<name>` and `<name>_standard_error` for each metric, and common settings."""

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
"""Numeric fields that are not quality metrics."""
PIXEL_METRICS = ("psnr", "ssim", "lpips", "kl", "codebook", "pca")
"""Name prefixes of metrics that do not depend on the feature network."""
SAMPLE_INDEPENDENT_SUFFIXES = ("reconstructions", "validation", "vae", "floor", "chance")
"""Name suffixes of metrics that do not depend on the samples."""
SUBSET_METRICS = ("kd", "precision", "recall", "density", "coverage", "cmmd")
JACKKNIFE_METRICS = ("fd", "class_shift")
DOF = dict.fromkeys(SUBSET_METRICS, NUM_SUBSETS - 1) | dict.fromkeys(JACKKNIFE_METRICS, NUM_GROUPS - 1)
"""Degrees of freedom of the standard errors, which come from subsets or jackknife groups, by name prefix."""


def metrics_from_json(content: Mapping[str, Any]) -> dict[str, Metric]:
    """Read the metrics of an evaluation, each with its standard error and the settings it depends on."""
    return {name: _read_metric(name, value, content) for name, value in finite_numbers(content).items()}


def finite_numbers(content: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite values of metrics by name, without settings, counts and standard errors."""
    return {
        name: float(value)
        for name, value in content.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if name not in (*SETTINGS, *NON_METRICS) and not name.startswith("num_") and not name.endswith(ERROR_SUFFIX)
    }


def _read_metric(name: str, value: float, content: Mapping[str, Any]) -> Metric:
    prefix, suffix = name.split("_")[0], name.split("_")[-1]
    pixel_settings = {"images", "num_images", "num_samples", *({"lpips_in_loss"} if prefix == "lpips" else ())}
    settings = {
        key: content[key]
        for key in SETTINGS
        if content.get(key) is not None
        and (key in pixel_settings if prefix in PIXEL_METRICS else key != "lpips_in_loss")
        and (key != "fd_components" or prefix == "fd")
        and not (suffix in SAMPLE_INDEPENDENT_SUFFIXES and key.startswith(("guidance", "sampler")))
    }
    error = content.get(name + ERROR_SUFFIX)
    dof: float = next((dof for key, dof in DOF.items() if name.startswith(f"{key}_")), math.inf)
    if error is None and prefix == "retrieval" and suffix != "chance":
        # the number of images equals the number of samples unless the file contains a smaller number
        num = content.get("num_held_out" if "_held_out_" in name else f"num_{suffix}")
        error = proportion_error(value, num or content["num_samples"])
    return Metric(value, error, dof, flatten(settings))
