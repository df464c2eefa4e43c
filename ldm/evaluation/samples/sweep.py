"""One setting of the sampler at several values: how good the samples are, and what they cost."""

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
from ldm.evaluation.samples.distances import Enough, Measures, align, describe_setting, fd_name
from ldm.evaluation.samples.kept import draw_and_keep
from ldm.metrics.metric import Metric, metrics_to_json
from ldm.metrics.subsets import NUM_SUBSETS, jackknife_error
from ldm.rules import Seed, apply_rules, checked
from ldm.sampling.draw import check_sampler, describe
from ldm.sampling.pipeline import LatentDiffusionPipeline

WITHIN = 2.0
"""Standard errors of a difference within which values are called equal."""
RULE = (
    f"the fewest network evaluations whose distance is within {WITHIN:g} standard errors of the smallest one; the "
    "errors are of the difference, whose both sides share noise, captions and groups of the jackknife"
)


@checked
def sweep_sampler(
    pipeline: LatentDiffusionPipeline,
    images: ImageData,
    samplers: Mapping[float, SamplerLike],
    guidances: Sequence[float],
    folder: Path,
    *,
    features: str = "efficientnet_lite",
    features_path: str | None = None,
    num_samples: Enough = 256,
    seed: Seed = 0,
    **options: Any,
) -> dict[str, Any]:
    """Distance to the training images over several samplers, by their steps, or several guidances; one of them is one.

    Every value draws the same samples from the same noise, which are kept in `folder`. The distance is the Fréchet
    distance, on principal components where there are too few samples for all dimensions.

    Returns:
        The settings, `rows` (a value, its cost, its distance and how far that is above the smallest, kernel distance,
        precision and recall), and the `knee`, see `RULE`.

    Raises:
        UserError: both vary, too few samples, what `draw_and_keep` refuses; of
            every value before the first is drawn.
    """
    if len(samplers) > 1 and len(guidances) > 1:
        raise UserError("sampler.steps= and guidance= are both lists. Vary one, then the other.")
    if len(guidances) > 1 and pipeline.conditioning.kind == "none":
        raise UserError("guidance= changes nothing of an unconditional model: leave it out, or vary sampler.steps=.")
    guidances = [apply_rules(draw_and_keep, {"guidance": guidance})["guidance"] for guidance in guidances]
    for sampler in samplers.values():
        check_sampler(sampler, pipeline.schedule)
    over = "sampler.steps" if len(samplers) > 1 else "guidance"
    network = load_features(features, images, features_path).to(pipeline.device)
    train = reference_features(network, features, images)[torch.from_numpy(images.train_indices)]
    measures = Measures.choose(train, num_samples)
    draw = partial(draw_and_keep, pipeline, images, folder=folder, num_samples=num_samples, seed=seed, **options)
    rows: list[dict[str, Any]] = []
    replicates = []
    for steps, sampler in samplers.items():
        for guidance in guidances:
            value = steps if over == "sampler.steps" else guidance
            kept = draw(sampler=sampler, guidance=guidance)
            drawn = extract(network, kept, f"features, {over}={value}")
            frechet, found = measures.frechet(drawn), measures.by_subsets(drawn)
            assert frechet is not None, "as many components as the samples allow"
            row: dict[str, Any] = {
                "value": value,
                "network_evaluations": kept.evaluations,
                "seconds": kept.seconds,
                "distance": frechet[0],
                "standard_error": jackknife_error(frechet[1]),
                **metrics_to_json({"kd": found["kd"]}),
            }
            row |= {name: found[name].value if found[name].is_measured else None for name in ("precision", "recall")}
            rows.append(row)
            replicates.append(frechet[1])
    compare_with_best(rows, replicates)
    return {
        "over": over,
        "metric": fd_name(network, measures.num_components),
        **describe_setting(network, features, images),
        "num_samples": num_samples,
        "num_per_subset": min(num_samples, len(train)) // NUM_SUBSETS,
        "sampler": {**describe(next(iter(samplers.values()))), "steps": list(samplers)},
        "guidance": list(guidances),
        "seed": seed,
        "rows": rows,
        "knee": knee(rows),
        "rule": RULE,
    }


def compare_with_best(rows: Sequence[dict[str, Any]], replicates: Sequence[Tensor]) -> None:
    """Add to each row how far its distance is above the smallest one, and the standard error of that difference.

    Args:
        replicates: Of each row's distance, [g], without one group of the samples each; the same groups in all rows,
            so that the jackknife of the difference is that of the differences.
    """
    best = min(range(len(rows)), key=lambda i: rows[i]["distance"])
    for row, without in zip(rows, replicates, strict=True):
        row["above_best"] = row["distance"] - rows[best]["distance"]
        row["above_best_standard_error"] = jackknife_error(without - replicates[best])


def knee(rows: Sequence[Mapping[str, Any]]) -> float:
    """The value by `RULE`; where costs are equal, the smaller distance."""
    equal = [row for row in rows if row["above_best"] <= WITHIN * row["above_best_standard_error"]]
    return min(equal, key=lambda row: (row["network_evaluations"], row["distance"]))["value"]


def sweep_table(found: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a sweep, its numbers as they are."""
    columns = [found["over"] if name == "value" else name for name in found["rows"][0]]
    return columns, [list(row.values()) for row in found["rows"]]


def sweep_lines(found: Mapping[str, Any]) -> list[str]:
    """The table in words, and the rule."""
    metric, over = found["metric"], found["over"]
    of = f"{feature_title(found)}, N={found['num_samples']}, ref={found['reference']}, N={found['num_reference']}"
    head = f"{metric} and KD ({of}) by {over}; precision and recall on subsets of {found['num_per_subset']}:"
    table = [[over, "evaluations", "s a sample", metric, "above the best", "KD", "precision", "recall"]]
    for row in found["rows"]:
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
    return [head, *align(table), f"{over}={found['knee']:g} is the knee: {found['rule']}."]


def plot_sampler_sweep(found: Mapping[str, Any]) -> Figure:
    """Distance over the network evaluations or the guidance; all else stands in the table."""
    rows, by_steps = found["rows"], found["over"] == "sampler.steps"
    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    x = [row["network_evaluations" if by_steps else "value"] for row in rows]
    errors = [WITHIN * row["standard_error"] for row in rows]
    axes.errorbar(x, [row["distance"] for row in rows], errors, marker="o", markersize=4, capsize=3)
    for place, row in zip(x, rows, strict=True):
        text = f"{row['value']:g}" + (" (knee)" if row["value"] == found["knee"] else "")
        axes.annotate(text, (place, row["distance"]), (6, 6), textcoords="offset points", fontsize=9)
    if by_steps:
        axes.set_xscale("log")
        axes.set_xticks(x, [f"{value:.4g}" for value in x])
        axes.minorticks_off()
    axes.set_xlabel("network evaluations per sample" if by_steps else "guidance scale")
    axes.set_ylabel(f"{found['metric']}, {found['features_key']}")
    number = f"{found['metric']} by {found['over']}; N={found['num_samples']}, {found['sampler']['method']}"
    axes.set_title(
        f"{number}\nref={found['reference']}; bars are +- {WITHIN:g} standard errors of a value", fontsize=10
    )
    return figure
