"""Sampler sweeps: the quality and the cost of samples as a function of sampler steps or guidance."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ldm.data.images import ImageData
from ldm.diffusion.samplers.base import SamplerLike
from ldm.errors import UserError
from ldm.evaluation.features import extract, feature_title, load_features, reference_features
from ldm.evaluation.samples.cache import draw_cached
from ldm.evaluation.samples.distances import Measures, SampleCount, align, describe_setting, fd_name
from ldm.metrics.metric import Metric, metrics_to_json
from ldm.metrics.subsets import NUM_SUBSETS, jackknife_error
from ldm.rules import Seed, apply_rules, checked
from ldm.sampling.draw import check_sampler, sampler_settings
from ldm.sampling.pipeline import LatentDiffusion

TOLERANCE = 2.0
"""Two distances count as equal if they differ by at most this many standard errors of the difference."""
RULE = (
    f"the fewest network evaluations with a distance within {TOLERANCE:g} standard errors of the smallest distance. "
    "The error is that of the difference between the two distances, which share noise, captions and jackknife groups"
)


@checked
def sweep_sampler(
    pipeline: LatentDiffusion,
    images: ImageData,
    samplers: Mapping[float, SamplerLike],
    guidances: Sequence[float],
    folder: Path,
    *,
    features: str = "efficientnet_lite",
    features_path: str | None = None,
    num_samples: SampleCount = 256,
    seed: Seed = 0,
    **options: Any,
) -> dict[str, Any]:
    """Measure the distance to the training images as a function of sampler steps or guidance, but not both.

    All values use the same noise and captions, and samples are cached in `folder`. The distance is the Fréchet
    distance, computed on principal components if there are too few samples for all dimensions.

    Args:
        samplers: Samplers by number of steps.

    Returns:
        The settings; `rows` with the cost, the distance, its excess over the smallest distance, the kernel distance,
        precision and recall for each value; and the `knee`, as defined by `RULE`.

    Raises:
        UserError: If both steps and guidance vary, there are too few samples, or as raised by `draw_cached`. All
            values are checked before sampling starts.
    """
    if len(samplers) > 1 and len(guidances) > 1:
        raise UserError("sampler.steps= and guidance= are both lists. Give a list for only one of them at a time.")
    if len(guidances) > 1 and pipeline.conditioning.kind == "none":
        raise UserError("guidance= has no effect on an unconditional model. Remove it, or vary sampler.steps= instead.")
    guidances = [apply_rules(draw_cached, {"guidance": guidance})["guidance"] for guidance in guidances]
    for sampler in samplers.values():
        check_sampler(sampler, pipeline.schedule)
    option = "sampler.steps" if len(samplers) > 1 else "guidance"
    network = load_features(features, images, features_path).to(pipeline.device)
    train = reference_features(network, features, images)[torch.from_numpy(images.train_indices)]
    measures = Measures.choose(train, num_samples)
    draw = partial(draw_cached, pipeline, images, folder=folder, num_samples=num_samples, seed=seed, **options)
    rows: list[dict[str, Any]] = []
    replicates = []
    for steps, sampler in samplers.items():
        for guidance in guidances:
            value = steps if option == "sampler.steps" else guidance
            samples = draw(sampler=sampler, guidance=guidance)
            sample_features = extract(network, samples, f"features, {option}={value}")
            frechet, metrics = measures.frechet(sample_features), measures.subset_metrics(sample_features)
            assert frechet is not None, "the number of components is chosen so that the samples suffice"
            row: dict[str, Any] = {
                "value": value,
                "network_evaluations": samples.evaluations,
                "seconds": samples.seconds,
                "distance": frechet[0],
                "standard_error": jackknife_error(frechet[1]),
                **metrics_to_json({"kd": metrics["kd"]}),
            }
            for name in ("precision", "recall"):
                row[name] = metrics[name].value if metrics[name].is_measured else None
            rows.append(row)
            replicates.append(frechet[1])
    compare_with_best(rows, replicates)
    return {
        "over": option,
        "metric": fd_name(network, measures.num_components),
        **describe_setting(network, features, images),
        "num_samples": num_samples,
        "num_per_subset": min(num_samples, len(train)) // NUM_SUBSETS,
        "sampler": {**sampler_settings(next(iter(samplers.values()))), "steps": list(samplers)},
        "guidance": list(guidances),
        "seed": seed,
        "rows": rows,
        "knee": knee(rows),
        "rule": RULE,
    }


def compare_with_best(rows: Sequence[dict[str, Any]], replicates: Sequence[Tensor]) -> None:
    """Add to each row the excess of its distance over the smallest distance, and the standard error of the excess.

    Args:
        replicates: Jackknife replicates [g] of the distance of each row. All rows use the same groups of samples, so
            the jackknife of a difference is computed from the differences between the replicates.
    """
    best = min(range(len(rows)), key=lambda i: rows[i]["distance"])
    for row, values in zip(rows, replicates, strict=True):
        row["above_best"] = row["distance"] - rows[best]["distance"]
        row["above_best_standard_error"] = jackknife_error(values - replicates[best])


def knee(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the value that `RULE` selects. Ties in cost are broken in favour of the smaller distance."""
    candidates = [row for row in rows if row["above_best"] <= TOLERANCE * row["above_best_standard_error"]]
    return min(candidates, key=lambda row: (row["network_evaluations"], row["distance"]))["value"]


def sweep_table(sweep: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Return the column names and rows of a sweep, with unformatted numbers."""
    columns = [sweep["over"] if name == "value" else name for name in sweep["rows"][0]]
    return columns, [list(row.values()) for row in sweep["rows"]]


def sweep_lines(sweep: Mapping[str, Any]) -> list[str]:
    """Return the table as lines of text, followed by the knee and the rule."""
    metric, option = sweep["metric"], sweep["over"]
    setting = f"{feature_title(sweep)}, N={sweep['num_samples']}, ref={sweep['reference']}, N={sweep['num_reference']}"
    header = f"{metric} and KD ({setting}) by {option}; precision and recall on subsets of {sweep['num_per_subset']}:"
    table = [[option, "evaluations", "s/sample", metric, "above best", "KD", "precision", "recall"]]
    for row in sweep["rows"]:
        shares = ["-" if row[name] is None else f"{row[name]:.3f}" for name in ("precision", "recall")]
        table.append(
            [
                f"{row['value']:g}",
                f"{row['network_evaluations']:.4g}",
                f"{row['seconds']:.3g}",
                f"{Metric(row['distance'], row['standard_error']):.3f}",
                f"{Metric(row['above_best'], row['above_best_standard_error']):.3f}",
                "-" if row["kd"] is None else f"{Metric(row['kd'], row['kd_standard_error']):.4f}",
                *shares,
            ]
        )
    return [header, *align(table), f"{option}={sweep['knee']:g} is the knee: {sweep['rule']}."]


def plot_sampler_sweep(sweep: Mapping[str, Any]) -> Figure:
    """Plot the distance against network evaluations or guidance."""
    rows, by_steps = sweep["rows"], sweep["over"] == "sampler.steps"
    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    x = [row["network_evaluations" if by_steps else "value"] for row in rows]
    errors = [TOLERANCE * row["standard_error"] for row in rows]
    axes.errorbar(x, [row["distance"] for row in rows], errors, marker="o", markersize=4, capsize=3)
    for position, row in zip(x, rows, strict=True):
        text = f"{row['value']:g}" + (" (knee)" if row["value"] == sweep["knee"] else "")
        axes.annotate(text, (position, row["distance"]), (6, 6), textcoords="offset points", fontsize=9)
    if by_steps:
        axes.set_xscale("log")
        axes.set_xticks(x, [f"{value:.4g}" for value in x])
        axes.minorticks_off()
    axes.set_xlabel("network evaluations per sample" if by_steps else "guidance scale")
    axes.set_ylabel(f"{sweep['metric']}, {sweep['features_key']}")
    title = f"{sweep['metric']} against {sweep['over']}; N={sweep['num_samples']}, {sweep['sampler']['method']}"
    axes.set_title(f"{title}\nref={sweep['reference']}; error bars: +- {TOLERANCE:g} standard errors", fontsize=10)
    return figure
