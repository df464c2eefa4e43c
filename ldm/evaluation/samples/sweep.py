"""One setting of the sampler at several values: how good the samples are, and what they cost."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

from ldm.data.images import ImageData
from ldm.diffusion.samplers.base import SamplerLike
from ldm.errors import UserError
from ldm.evaluation.evaluation_file import metrics_to_json
from ldm.evaluation.features import describe_features, extract, load_features, reference_features
from ldm.evaluation.samples.distances import Measures, fd_name
from ldm.evaluation.samples.kept import check_guidance, draw_and_keep
from ldm.metrics.subsets import NUM_SUBSETS, jackknife_error
from ldm.sampling.draw import describe
from ldm.sampling.pipeline import LatentDiffusionPipeline

WITHIN = 2.0
"""Standard errors of a difference within which values are called equal."""
RULE = (
    f"the fewest network evaluations whose distance is within {WITHIN:g} standard errors of the smallest one; the "
    "errors are of the difference, whose both sides share noise, captions and groups of the jackknife"
)
INK, LINE, FAINT = "#333333", "#0072B2", "#8a8a8a"


def sweep_sampler(
    pipeline: LatentDiffusionPipeline,
    images: ImageData,
    samplers: Mapping[float, SamplerLike],
    guidances: Sequence[float],
    folder: Path,
    *,
    features: str = "efficientnet_lite",
    features_path: str | None = None,
    num_samples: int = 256,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Distance to the training images over several samplers, by their steps, or several guidances; one of them is one.

    Every value draws the same samples from the same noise, which are kept in `folder`. The distance is the Fréchet
    distance, on principal components where there are too few samples for all dimensions.

    Returns:
        The settings, `rows` (a value, its cost, its distance and how far that is above the smallest, kernel distance,
        precision and recall), and the `knee`, see `RULE`.

    Raises:
        UserError: both vary, guidance of a model that knows none, too few samples, what `draw_and_keep` refuses; of
            every value before the first is drawn.
    """
    _check_sweep(pipeline, samplers, guidances, num_samples)
    guidances = [check_guidance(guidance) for guidance in guidances]
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
            row, without = _measure_value(measures, extract(network, kept, f"features, {over}={value}"))
            cost = {"network_evaluations": kept.evaluations, "seconds": kept.seconds}
            rows.append({"value": value, **cost, **row})
            replicates.append(without)
    compare_with_best(rows, replicates)
    return {
        "over": over,
        "metric": fd_name(network, measures.num_components),
        **describe_features(network, features),
        "num_samples": num_samples,
        "num_per_subset": min(num_samples, len(train)) // NUM_SUBSETS,
        "reference": f"{images.name}/train@{images.fingerprint[:8]}",
        "num_reference": len(train),
        "sampler": {**describe(next(iter(samplers.values()))), "steps": list(samplers)},
        "guidance": list(guidances),
        "seed": seed,
        "rows": rows,
        "knee": knee(rows),
        "rule": RULE,
    }


def _check_sweep(
    pipeline: LatentDiffusionPipeline,
    samplers: Mapping[float, SamplerLike],
    guidances: Sequence[float],
    num_samples: int,
) -> None:
    if len(samplers) > 1 and len(guidances) > 1:
        raise UserError("sampler.steps= and guidance= are both lists. Vary one, then the other.")
    if len(guidances) > 1 and pipeline.conditioning.kind == "none":
        raise UserError(
            f"guidance={','.join(map(str, guidances))}: this model is unconditional, so that guidance changes nothing. "
            "Leave guidance= out, or vary sampler.steps=."
        )
    if num_samples < 8:
        raise UserError(f"num_samples={num_samples}: a distance with its error needs 8 at least.")
    for steps, sampler in samplers.items():
        try:
            sampler.check(pipeline.schedule)
        except ValueError as error:
            raise UserError(f"sampler={sampler.method} with {steps} steps: {error}.") from error


def _measure_value(measures: Measures, features: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Metrics of the samples of one value, and the replicates of their distance."""
    frechet = measures.frechet(features)
    assert frechet is not None, "as many components as the samples allow"
    found = measures.of(features, frechet=frechet)
    row = {"distance": frechet[0], "standard_error": found["fd"].standard_error, **metrics_to_json({"kd": found["kd"]})}
    row |= {name: found[name].value if found[name].is_measured else None for name in ("precision", "recall")}
    return row, frechet[1]


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
    columns = [found["over"], *(name for name in found["rows"][0] if name != "value")]
    return columns, [list(row.values()) for row in found["rows"]]


def sweep_lines(found: Mapping[str, Any]) -> list[str]:
    """The table in words, and the rule."""
    metric, over, library = found["metric"], found["over"], found["features_library"]
    of = f"{found['features_key']}{f' ({library})' if library else ''}"
    wide = max(19, len(metric) + 2)
    listed = [
        f"{metric} and KD ({of}, N={found['num_samples']}, ref={found['reference']}, N={found['num_reference']}) by "
        f"{over}; precision and recall on subsets of {found['num_per_subset']}:",
        f"  {over:>13}{'evaluations':>13}{'s a sample':>12}{metric:>{wide}}{'above the best':>19}{'KD':>18}"
        f"{'precision':>11}{'recall':>8}",
    ]
    for row in found["rows"]:
        shares = ["-" if row[name] is None else f"{row[name]:.3f}" for name in ("precision", "recall")]
        distance = f"{row['distance']:.3f} +- {row['standard_error']:.3f}"
        above = f"{row['above_best']:.3f} +- {row['above_best_standard_error']:.3f}"
        kd = "-" if row["kd"] is None else f"{row['kd']:.4f} +- {row['kd_standard_error']:.4f}"
        listed.append(
            f"  {row['value']:>13g}{row['network_evaluations']:>13.4g}{row['seconds']:>12.3g}{distance:>{wide}}"
            f"{above:>19}{kd:>18}{shares[0]:>11}{shares[1]:>8}"
        )
    return [*listed, f"{over}={found['knee']:g} is the knee: {found['rule']}."]


def plot_sampler_sweep(found: Mapping[str, Any]) -> Figure:
    """Distance over the network evaluations or the guidance, precision and recall, and what a sample costs in time."""
    rows, over = found["rows"], found["over"]
    by_steps = over == "sampler.steps"
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    first, second = figure.subplots(1, 2)
    x = [row["network_evaluations" if by_steps else "value"] for row in rows]
    label = "network evaluations per sample" if by_steps else "guidance scale"
    errors = [WITHIN * row["standard_error"] for row in rows]
    first.errorbar(x, [row["distance"] for row in rows], errors, color=LINE, marker="o", markersize=4, capsize=3)
    for place, row in zip(x, rows, strict=True):
        is_knee = row["value"] == found["knee"]
        first.annotate(
            f"{row['value']:g}" + (" (knee)" if is_knee else ""),
            (place, row["distance"]),
            xytext=(6, 6),
            textcoords="offset points",
            fontsize=9,
            color=INK if is_knee else FAINT,
            fontweight="bold" if is_knee else "normal",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
    first.set(xlabel=label, ylabel=f"{found['metric']}\n{found['features_key']}", title=f"{found['metric']} by {over}")
    _plot_cost_or_precision(second, rows, x, label, by_steps)
    for axes in (first, second):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(11)
        if by_steps:
            axes.set_xscale("log")
            axes.set_xticks(x, [f"{value:.4g}" for value in x])
            axes.minorticks_off()
    number = f"N={found['num_samples']}, {found['sampler']['method']}; ref={found['reference']}"
    bars = f"bars are +- {WITHIN:g} standard errors of a value; the knee goes by those of differences"
    figure.suptitle(f"{number}; {bars}", fontsize=11)
    return figure


def _plot_cost_or_precision(
    axes: Axes, rows: Sequence[Mapping[str, Any]], x: Sequence[float], label: str, by_steps: bool
) -> None:
    axes.set_xlabel(label)
    if by_steps:
        axes.plot(x, [row["seconds"] for row in rows], color=LINE, marker="o", markersize=4)
        axes.set(ylabel="seconds per sample", title="Cost")
        axes.set_ylim(bottom=0)
        return
    for name, colour in (("precision", LINE), ("recall", "#D55E00")):
        values = [math.nan if row[name] is None else row[name] for row in rows]
        axes.plot(x, values, color=colour, marker="o", markersize=4, label=name)
    axes.set(title="Precision and recall", ylim=(0, 1))
    axes.legend(frameon=False)
