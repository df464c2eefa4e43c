"""Report on a latent size sweep: the quality and cost of each size on held-out images, and one recommendation.

docs/latent_size.md explains the numbers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ldm.diffusion.samplers.base import SamplerLike
from ldm.errors import UserError
from ldm.evaluation.latents.report import held_out_pca
from ldm.evaluation.latents.sweep import MAX_MINUTES, NO_SAMPLING_DECODER, SweepRun, as_time
from ldm.evaluation.latents.sweep_figure import plot_size_sweep
from ldm.evaluation.reconstructions import report as reconstruction_report
from ldm.evaluation.samples import report as sample_report
from ldm.evaluation.samples.distances import SampleCount
from ldm.latents import spectrum
from ldm.metrics.report import Report
from ldm.rules import Count, Integer, Number, Seed, checked
from ldm.runs.lineage import run_weights_sha256
from ldm.runs.run import Run, choose_images
from ldm.runtime import shell

BUDGET_FACTOR = 10
"""Time budget of the recommended training run, as a multiple of the sweep's time budget."""
ROWS = (
    ("values per image", "num_values", "d"),
    ("compression", "compression", ".1f"),
    ("KL, bits per image", "kl_bits", ".0f"),
    ("PSNR, dB", "psnr_db", ".2f"),
    ("  +- over images", "psnr_db_standard_error", ".2f"),
    ("PSNR of PCA, dB", "pca_psnr_db", ".2f"),
    ("gain over PCA, dB", "gain_db", "+.2f"),
    ("SSIM", "ssim", ".3f"),
    ("FD", "fd", ".3g"),
    ("KD", "kd", ".4f"),
    ("  +- over subsets", "kd_standard_error", ".4f"),
    ("features used in loss", "features_in_loss", "d"),
    ("steps", "steps", "d"),
    ("minutes", "minutes", ".1f"),
)
"""Label, key and number format of each row of the table."""
SAMPLE_ROWS = (
    ("FD of samples", "fd_samples", ".3g"),
    ("KD of samples", "kd_samples", ".4f"),
    ("  +- over subsets", "kd_samples_standard_error", ".4f"),
    ("steps of stage 2", "stage_2_steps", "d"),
    ("minutes of stage 2", "stage_2_minutes", ".1f"),
)
"""Rows of a sweep that trained stage 2."""


@checked
def measure_sweep(
    sweep_runs: Sequence[SweepRun],
    stage_2: Sequence[SweepRun] = (),
    *,
    sampler: SamplerLike,
    device: torch.device,
    features: str = "efficientnet_lite",
    target_psnr_db: Number = 25.0,
    num_images: Annotated[Integer, Field(ge=2)] = 2048,
    num_samples: SampleCount = 256,
    seed: Seed = 0,
    batch_size: Count = 64,
) -> Report:
    """Measure all runs on the same held-out images, and compare them with PCAs of the same and intermediate sizes.

    Args:
        stage_2: Diffusion runs on these autoencoders, in the same order, whose samples are measured; or none.

    Raises:
        UserError: If the runs were trained on different images, or as raised by `measure_reconstructions`.
    """
    runs = [Run.open(sweep_run.folder) for sweep_run in sweep_runs]
    if len({run.facts["data_fingerprint"] for run in runs}) > 1:
        raise UserError(
            "The runs of this sweep were trained on different images, because the data changed between runs. Choose a "
            "new name= to train all of them again."
        )
    options: dict[str, Any] = {"num_images": num_images, "seed": seed, "batch_size": batch_size}
    rows: list[dict[str, Any]] = []
    for sweep_run, run in zip(sweep_runs, runs, strict=True):
        print(f"measuring {len(rows) + 1} of {len(runs)}: {sweep_run.name}", flush=True)
        report = reconstruction_report.measure_reconstructions(run, device=device, features=features, **options)
        report.save(run.path)
        rows.append(_sweep_row(sweep_run, run, report.to_json()))
    for row, sweep_run in zip(rows, stage_2, strict=bool(stage_2)):
        print(f"samples of {sweep_run.name}", flush=True)
        row |= _measure_samples(Run.open(sweep_run.folder), sampler, device, features, num_samples, seed)
    widest = {row["factor"]: row for row in sorted(rows, key=lambda row: row["latent_shape"][0])}
    advice = recommend_size(rows, target_psnr_db)
    best = next(sweep_run for sweep_run in sweep_runs if sweep_run.name == advice["name"])
    overrides = (option for option in best.overrides if option != NO_SAMPLING_DECODER)
    command = shell.train_command("stage=vae", f"name={best.name}", *overrides)
    longer = command.replace(as_time(best.minutes), as_time(min(BUDGET_FACTOR * best.minutes, MAX_MINUTES)))
    results = {
        **options,
        "num_samples": num_samples if stage_2 else None,
        "images": rows[0]["images"],
        "num_images": rows[0]["num_images"],
        "resolution": runs[0].image_data().resolution,
        "features": features,
        "target_psnr_db": target_psnr_db,
        "rows": rows,
        "pca": {str(factor): _pca_baseline(runs[0], widest[factor], **options) for factor in sorted(widest)},
        "recommendation": {**advice, "train": longer, "next": Run.open(best.folder).next_training_command()},
    }
    advice = results["recommendation"]
    lines = [
        f"Recommendation: {advice['text']}",
        f"Train it for longer: {advice['train']}",
        f"Or train stage 2 now: {advice['next']}",
    ]
    trainings = {f"{x.stage}/{x.name}": x.overrides for x in (*sweep_runs, *stage_2)}
    content = {"trainings": trainings, "report": results}
    return Report("sweep.json", content, size_table(results), lines, {"sweep.png": plot_size_sweep(results)})


def _sweep_row(sweep_run: SweepRun, run: Run, metrics: dict[str, Any]) -> dict[str, Any]:
    shape, size = metrics["latent_shape"], sweep_run.size
    return metrics | {
        "name": sweep_run.name,
        "size": str(size),
        "loss": sweep_run.loss,
        "num_values": math.prod(shape),
        "compression": 3 * (shape[1] * size.factor) ** 2 / math.prod(shape),
        "gain_db": metrics["psnr_db"] - metrics["pca_psnr_db"],
        "fd": metrics.get("fd_reconstructions"),
        "fd_components": metrics.get("fd_components"),
        "kd": metrics.get("kd_reconstructions"),
        "kd_standard_error": metrics.get("kd_reconstructions_standard_error"),
        "steps": run.facts["figures"]["steps"],
        "minutes": run.facts["figures"]["training_s"] / 60,
    }


def _measure_samples(
    run: Run, sampler: SamplerLike, device: torch.device, features: str, num_samples: int, seed: int
) -> dict[str, Any]:
    """Evaluate the samples of a diffusion run, and return the entries of its row."""
    options: Any = {"features": features, "num_samples": num_samples, "seed": seed}
    pipeline, digest = run.pipeline().to(device), run_weights_sha256(run)
    report = sample_report.measure_samples(
        pipeline, run.image_data(), sampler, run.path / "evaluation", weights_sha256=digest, **options
    )
    sample_report.save_unless_smaller(report, run.path, run.evaluation_file)
    metrics = report.to_json()
    return {
        **{key: metrics.get(key) for key in ("fd_samples", "kd_samples", "kd_samples_standard_error")},
        "stage_2_steps": run.facts["figures"]["steps"],
        "stage_2_minutes": run.facts["figures"]["training_s"] / 60,
    }


def _pca_baseline(run: Run, row: dict[str, Any], *, num_images: int, seed: int, batch_size: int) -> dict[str, Any]:
    """Return the held-out PSNR of PCAs of f x f patches for several numbers of components, without the lossless PCA."""
    factor, (images, indices) = row["factor"], choose_images(run, "val", num_images, seed)
    counts = [count for count in spectrum.pca_counts(3 * factor**2, row["latent_shape"][0]) if count < 3 * factor**2]
    locations = (images.resolution // factor) ** 2
    curve = held_out_pca(images, indices, factor, counts, batch_size)
    return {"channels": counts, "num_values": [n * locations for n in counts], "psnr_db": curve}


def recommend_size(rows: Sequence[Mapping[str, Any]], target_psnr_db: float) -> dict[str, Any]:
    """Recommend one size and one of its runs, with a reason.

    1. Rule "smallest": among the sizes with a run that reaches `target_psnr_db`, the one with the fewest values per
       image, because this size is the easiest for stage 2. Ties are broken by the highest PSNR.
    2. Rule "best", if no run reaches the target: the run with the highest PSNR.

    If several runs of that size qualify, the one with the lowest FD is recommended, or the one with the highest PSNR if
    FD was not measured or a run was trained with the same features in the loss.

    If the samples of all runs that reach the target were measured, with features that no loss uses, rule "samples"
    replaces rule 1: the run with the lowest KD of samples.
    """
    sufficient = [row for row in rows if row["psnr_db"] >= target_psnr_db]
    if sufficient and all(row.get("kd_samples") is not None and not row["features_in_loss"] for row in sufficient):
        choice = min(sufficient, key=lambda row: row["kd_samples"])
        reason = f"Of those that reach target_psnr_db={target_psnr_db:g}, it has the lowest KD of samples"
        return _advice("samples", choice, f"{reason}, {choice['kd_samples']:.3f}.")
    best = max(rows, key=lambda row: row["psnr_db"])
    selected = min(sufficient, key=lambda row: (row["num_values"], -row["psnr_db"])) if sufficient else best
    same_size = [row for row in rows if row["size"] == selected["size"]]
    use_fd = all(row["fd"] is not None and not row["features_in_loss"] for row in same_size)
    candidates = [row for row in same_size if row in sufficient] or [selected]
    choice = min(candidates, key=lambda row: row["fd"]) if use_fd else max(candidates, key=lambda row: row["psnr_db"])
    reason = "It is the smallest size that reaches" if sufficient else "It has the highest PSNR, but no size reaches"
    return _advice("smallest" if sufficient else "best", choice, f"{reason} target_psnr_db={target_psnr_db:g}.")


def _advice(rule: str, choice: Mapping[str, Any], reason: str) -> dict[str, Any]:
    text = (
        f"{choice['size']} ({choice['num_values']} values per image) with the {choice['loss']} loss, "
        f"{choice['psnr_db']:.2f} dB. {reason}"
    )
    return {"rule": rule, "size": choice["size"], "name": choice["name"], "text": text}


def size_table(report: Mapping[str, Any]) -> Table:
    """Return a table with one column per size and loss."""
    title = f"{report['num_images']} held-out images from {report['images']}; features: {report['features']}"
    table = Table("", title=title, title_justify="left", box=SIMPLE_HEAD)
    for row in report["rows"]:
        table.add_column(f"{row['size']}\n{row['loss']}", justify="right", no_wrap=True)
    for label, key, spec in ROWS if report["num_samples"] is None else ROWS + SAMPLE_ROWS:
        values = (row[key] for row in report["rows"])
        table.add_row(label, *("-" if value is None else f"{value:{spec}}" for value in values))
    return table
