"""What each latent size of a sweep keeps of held-out images and costs: a table, a recommendation, a JSON, a picture.

How to read them: docs/reading_the_numbers.md.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ldm.errors import UserError
from ldm.evaluation.latents.report import held_out_pca
from ldm.evaluation.latents.sweep import MOST_MINUTES, SweepTraining, as_time
from ldm.evaluation.latents.sweep_figure import plot_size_sweep
from ldm.evaluation.reconstructions import report as reconstruction_report
from ldm.latents import spectrum
from ldm.metrics.report import Report
from ldm.rules import Count, Number, Seed, Whole, checked
from ldm.runs.run import Run, choose_images
from ldm.runtime import shell

LONGER = 10
"""The training that is proposed takes so many times the sweep's minutes."""
ROWS = (
    ("values per image", "num_values", "d"),
    ("compression", "compression", ".1f"),
    ("KL, bits per image", "kl_bits", ".0f"),
    ("PSNR, dB", "psnr_db", ".2f"),
    ("  +- over images", "psnr_db_standard_error", ".2f"),
    ("PSNR of a PCA, dB", "pca_psnr_db", ".2f"),
    ("gain over it, dB", "gain_db", "+.2f"),
    ("SSIM", "ssim", ".3f"),
    ("FD", "fd", ".3g"),
    ("KD", "kd", ".4f"),
    ("  +- over subsets", "kd_standard_error", ".4f"),
    ("these features in loss", "features_in_loss", "d"),
    ("steps", "steps", "d"),
    ("minutes", "minutes", ".1f"),
)


@checked
def measure_sweep(
    trainings: Sequence[SweepTraining],
    *,
    device: torch.device,
    features: str = "efficientnet_lite",
    target_psnr_db: Number = 25.0,
    num_images: Annotated[Whole, Field(ge=2)] = 2048,
    seed: Seed = 0,
    batch_size: Count = 64,
) -> Report:
    """Measure every run on the same held-out images, beside PCAs of the sizes between them.

    Raises:
        UserError: runs on different images; what `measure_reconstructions` refuses.
    """
    runs = [Run.open(training.folder) for training in trainings]
    if len({run.facts["data_fingerprint"] for run in runs}) > 1:
        raise UserError(
            "The runs of this sweep were trained on different images: they changed in between. Choose another name= "
            "and train them all again."
        )
    options: dict[str, Any] = {"num_images": num_images, "seed": seed, "batch_size": batch_size}
    rows: list[dict[str, Any]] = []
    for training, run in zip(trainings, runs, strict=True):
        print(f"measuring {len(rows) + 1} of {len(runs)}: {training.name}", flush=True)
        report = reconstruction_report.measure_reconstructions(run, device=device, features=features, **options)
        report.save(run.path)
        rows.append(_sweep_row(training, run, report.to_json()))
    widest = {row["factor"]: row for row in sorted(rows, key=lambda row: row["latent_shape"][0])}
    advice = recommend_size(rows, target_psnr_db)
    best = next(training for training in trainings if training.name == advice["name"])
    again = shell.train_command("stage=vae", f"name={best.name}", *best.overrides)
    longer = again.replace(as_time(best.minutes), as_time(min(LONGER * best.minutes, MOST_MINUTES)))
    found = {
        **options,
        "images": rows[0]["images"],
        "num_images": rows[0]["num_images"],
        "resolution": runs[0].image_data().resolution,
        "features": features,
        "target_psnr_db": target_psnr_db,
        "rows": rows,
        "pca": {str(factor): _pca_beside(runs[0], widest[factor], **options) for factor in sorted(widest)},
        "recommendation": {**advice, "train": longer, "next": Run.open(best.folder).next_training()},
    }
    advice = found["recommendation"]
    lines = [f"Recommendation: {advice['text']}", f"longer: {advice['train']}", f"stage 2: {advice['next']}"]
    content = {"trainings": {training.name: training.overrides for training in trainings}, "report": found}
    return Report("sweep.json", content, size_table(found), lines, {"sweep.png": plot_size_sweep(found)})


def _sweep_row(training: SweepTraining, run: Run, measured: dict[str, Any]) -> dict[str, Any]:
    shape, size = measured["latent_shape"], training.size
    return measured | {
        "name": training.name,
        "size": str(size),
        "loss": training.loss,
        "num_values": math.prod(shape),
        "compression": 3 * (shape[1] * size.factor) ** 2 / math.prod(shape),
        "gain_db": measured["psnr_db"] - measured["pca_psnr_db"],
        "fd": measured.get("fd_reconstructions"),
        "fd_components": measured.get("fd_components"),
        "kd": measured.get("kd_reconstructions"),
        "kd_standard_error": measured.get("kd_reconstructions_standard_error"),
        "steps": run.facts["figures"]["steps"],
        "minutes": run.facts["figures"]["training_s"] / 60,
    }


def _pca_beside(run: Run, row: dict[str, Any], *, num_images: int, seed: int, batch_size: int) -> dict[str, Any]:
    """Held-out PSNR by the number of components of f x f patches, without the number that loses nothing."""
    factor, (images, indices) = row["factor"], choose_images(run, "val", num_images, seed)
    counts = [count for count in spectrum.pca_counts(3 * factor**2, row["latent_shape"][0]) if count < 3 * factor**2]
    locations = (images.resolution // factor) ** 2
    curve = held_out_pca(images, indices, factor, counts, batch_size)
    return {"channels": counts, "num_values": [n * locations for n in counts], "psnr_db": curve}


def recommend_size(rows: Sequence[Mapping[str, Any]], target_psnr_db: float) -> dict[str, Any]:
    """One size with its reason, and which of its runs.

    1. smallest: of the sizes with a run of `target_psnr_db` at least, the one with the fewest values per image, which
       is the easiest for stage 2; of equals the one with the highest PSNR.
    2. best: none has. The run with the highest PSNR.

    Of several runs of that size that may be chosen, the one with the lowest FD, where none has its features in its
    loss; otherwise the one with the highest PSNR.
    """
    reached = [row for row in rows if row["psnr_db"] >= target_psnr_db]
    best = max(rows, key=lambda row: row["psnr_db"])
    first = min(reached, key=lambda row: (row["num_values"], -row["psnr_db"])) if reached else best
    of_size = [row for row in rows if row["size"] == first["size"]]
    fair = all(row["fd"] is not None and not row["features_in_loss"] for row in of_size)
    allowed = [row for row in of_size if row in reached] or [first]
    chosen = min(allowed, key=lambda row: row["fd"]) if fair else max(allowed, key=lambda row: row["psnr_db"])
    reason = "the fewest values of those that reach" if reached else "the highest PSNR, and no size reaches"
    text = (
        f"{chosen['size']} ({chosen['num_values']} values per image) with the {chosen['loss']} loss: "
        f"{chosen['psnr_db']:.2f} dB, {reason} target_psnr_db={target_psnr_db:g}."
    )
    return {"rule": "smallest" if reached else "best", "size": chosen["size"], "name": chosen["name"], "text": text}


def size_table(report: Mapping[str, Any]) -> Table:
    """A column for each size and loss."""
    title = f"{report['num_images']} held-out images of {report['images']}; features: {report['features']}"
    table = Table("", title=title, title_justify="left", box=SIMPLE_HEAD)
    for row in report["rows"]:
        table.add_column(f"{row['size']}\n{row['loss']}", justify="right", no_wrap=True)
    for label, key, form in ROWS:
        table.add_row(label, *("-" if row[key] is None else f"{row[key]:{form}}" for row in report["rows"]))
    return table
