"""One setting of the sampler at several values: how good the samples are, and what they cost."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ldm.data.images import ImageData
from ldm.diffusion.sampler import SamplerLike
from ldm.errors import UserError
from ldm.evaluation.feature_extraction import extract, load_features, reference_features
from ldm.evaluation.kept_samples import check_guidance, draw_and_keep
from ldm.evaluation.sample_distances import Measures
from ldm.pipeline import LatentDiffusionPipeline
from ldm.sampling import describe

WITHIN = 2.0
"""Standard errors within which values are called equal; all values share their noise, so this rather errs on equal."""
RULE = (
    f"the fewest network evaluations whose distance is within {WITHIN:g} standard errors of the smallest one, both "
    "errors together"
)
INK, LINE, FAINT = "#333333", "#0072B2", "#8a8a8a"


def sweep(
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
    distance in all dimensions, or the kernel distance where there are too few samples for it.

    Returns:
        The settings, `rows` (a value, its cost, its distance, precision and recall), and the `knee`, see `RULE`.

    Raises:
        UserError: both vary, too few samples, what `draw_and_keep` refuses; of every value before the first is drawn.
    """
    if len(samplers) > 1 and len(guidances) > 1:
        raise UserError("sampler.steps= and guidance= are both lists. Vary one, then the other.")
    if num_samples < 8:
        raise UserError(f"num_samples={num_samples}: a distance with its error needs 8 at least.")
    for steps, sampler in samplers.items():
        try:
            sampler.check(pipeline.schedule)
        except ValueError as error:
            raise UserError(f"sampler={sampler.method} with {steps} steps: {error}.") from error
    guidances = [check_guidance(guidance) for guidance in guidances]
    over = "sampler.steps" if len(samplers) > 1 else "guidance"
    network = load_features(features, images, features_path).to(pipeline.device)
    train = reference_features(network, features, images)[torch.from_numpy(images.train_indices)]
    measures = Measures.choose(train, num_samples)
    metric = "kd" if measures.num_components else "fd"
    rows = []
    for steps, sampler in samplers.items():
        for guidance in guidances:
            kept = draw_and_keep(
                pipeline,
                images,
                sampler,
                folder,
                num_samples=num_samples,
                guidance=guidance,
                seed=seed,
                **options,
            )
            value = steps if over == "sampler.steps" else guidance
            measured = measures.of(extract(network, kept, f"features, {over}={value}"))
            distance = measured[metric]
            assert distance is not None
            row: dict[str, Any] = {"value": value, "network_evaluations": kept.evaluations, "seconds": kept.seconds}
            row |= {"distance": distance[0], "standard_error": distance[1]}
            for name in ("precision", "recall"):
                row[name] = None if (numbers := measured[name]) is None else numbers[0]
            rows.append(row)
    return {
        "over": over,
        "metric": measures.fd_name(network) if metric == "fd" else "KD",
        "features": features,
        "num_samples": num_samples,
        "reference": f"{images.name}/train@{images.fingerprint[:8]}",
        "num_reference": len(train),
        "sampler": {**describe(next(iter(samplers.values()))), "steps": list(samplers)},
        "guidance": list(guidances),
        "seed": seed,
        "rows": rows,
        "knee": knee(rows),
        "rule": RULE,
    }


def knee(rows: Sequence[Mapping[str, Any]]) -> float:
    """The value by `RULE`; where costs are equal, the smaller distance."""
    best = min(rows, key=lambda row: row["distance"])

    def is_equal(row: Mapping[str, Any]) -> bool:
        error = math.hypot(row["standard_error"], best["standard_error"])
        return row is best or row["distance"] - best["distance"] <= WITHIN * error

    return min(filter(is_equal, rows), key=lambda row: (row["network_evaluations"], row["distance"]))["value"]


def lines(found: Mapping[str, Any]) -> list[str]:
    """The table in words, and the rule."""
    metric, over = found["metric"], found["over"]
    listed = [
        f"{metric} ({found['features']}, N={found['num_samples']}, ref={found['reference']}, "
        f"N={found['num_reference']}) by {over}:",
        f"  {over:>14}{'evaluations':>13}{'s a sample':>12}{metric:>20}{'precision':>11}{'recall':>8}",
    ]
    for row in found["rows"]:
        shares = ["-" if row[name] is None else f"{row[name]:.3f}" for name in ("precision", "recall")]
        distance = f"{row['distance']:.4f} +- {row['standard_error']:.4f}"
        listed.append(
            f"  {row['value']:>14g}{row['network_evaluations']:>13.4g}{row['seconds']:>12.3g}{distance:>20}"
            f"{shares[0]:>11}{shares[1]:>8}"
        )
    return [*listed, f"{over}={found['knee']:g} is the knee: {found['rule']}."]


def draw(found: Mapping[str, Any]) -> Figure:
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
        )
    first.set(xlabel=label, ylabel=f"{found['metric']}, {found['features']}", title=f"{found['metric']} by {over}")
    _draw_beside(second, rows, x, label, by_steps)
    for axes in (first, second):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(11)
        if by_steps:
            axes.set_xscale("log")
            axes.set_xticks(x, [f"{value:.4g}" for value in x])
            axes.minorticks_off()
    number = f"N={found['num_samples']}, {found['sampler']['method']}; bars are +- {WITHIN:g} standard errors"
    figure.suptitle(f"{number}; ref={found['reference']}", fontsize=11)
    return figure


def _draw_beside(axes: Axes, rows: Sequence[Mapping[str, Any]], x: Sequence[float], label: str, by_steps: bool) -> None:
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
