"""What each latent size of a sweep keeps of held-out images and costs: a table, a recommendation, a JSON, a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ldm.errors import UserError, require_whole
from ldm.evaluation.classifier import Classifier
from ldm.evaluation.evaluation_file import metrics_to_json
from ldm.evaluation.features import NO_FEATURES
from ldm.evaluation.image_sets import track_batches
from ldm.evaluation.latents.report import PCA_IMAGES, pca_curve
from ldm.evaluation.latents.sweep import SweepTraining, format_duration
from ldm.evaluation.latents.sweep_figure import plot_size_sweep
from ldm.evaluation.latents.sweep_runs import update_sweep_file
from ldm.evaluation.reconstructions import report as reconstruction_report
from ldm.latents import spectrum
from ldm.metrics.features import CHOICES
from ldm.metrics.image import patch_components
from ldm.metrics.metric import UNMEASURED
from ldm.runs.run import Run, choose_images
from ldm.runtime import shell

LONGER, MOST_MINUTES = 10, 5999
"""The training that is proposed takes so many times the sweep's minutes, and so many at most."""


IN_FEATURES = ("fd", "kd", "kd_standard_error")
"""Keys of a row that are null where no features were measured."""
ROWS = (
    ("latent", "latent_shape", ""),
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
    ("steps", "steps", "d"),
    ("minutes", "minutes", ".1f"),
)
LABELS, COLUMN = 22, 14


@dataclass(frozen=True)
class SweepReport:
    """The report of sweep.json."""

    content: dict[str, Any]

    @property
    def width(self) -> int:
        """Characters a line that the table needs."""
        return LABELS + COLUMN * len(self.content["rows"])

    def table(self) -> Table:
        """A column for each size and loss."""
        found = self.content
        title = f"{found['num_images']} held-out images of {found['images']}"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        table.add_column("", no_wrap=True)
        for row in found["rows"]:
            style = "bold" if row["name"] == found["recommendation"]["name"] else None
            table.add_column(f"{row['size']}\n{row['loss']}", justify="right", no_wrap=True, style=style)
        for name, key, form in ROWS:
            if key in IN_FEATURES and found["features"] == NO_FEATURES:
                continue
            mark = "*" if key in ("fd", "kd") else ""
            table.add_row(
                name, *(_format_cell(row[key], form, mark * row["features_in_loss"]) for row in found["rows"])
            )
        return table

    @property
    def lines(self) -> list[str]:
        """The features, the recommendation, and the commands that follow it."""
        found, advice = self.content, self.content["recommendation"]
        features = [_feature_line(found["rows"][0], found["features"], found["num_images"])]
        if any(row["features_in_loss"] for row in found["rows"]):
            features = [f"{features[0]} *: these features are in the loss, so that their FD and KD prove nothing."]
        return [
            *(features if found["features"] != NO_FEATURES else []),
            f"Recommendation: {advice['text']}",
            f"longer: {advice['train']}",
            f"stage 2: {advice['next']}",
        ]

    def save(self, folder: Path) -> tuple[Path, Path]:
        """sweep.json and sweep.png."""
        picture = folder / "sweep.png"
        plot_size_sweep(self.content).savefig(picture, dpi=130)
        return update_sweep_file(folder, report=self.content), picture


def check_sweep_options(features: str, target_psnr_db: Any, num_images: Any, seed: Any, batch_size: Any) -> None:
    """Refuse what `measure_sweep` could not do, before anything is trained.

    Raises:
        UserError: naming the key, its value and the rule.
    """
    known = (*CHOICES, Classifier.name, NO_FEATURES)
    if features not in known:
        raise UserError(f"features={features} is unknown. Choose one of: {', '.join(known)}.")
    if type(target_psnr_db) not in (int, float):
        raise UserError(f"target_psnr_db={target_psnr_db} must be a number of decibels.")
    if type(seed) is not int:
        raise UserError(f"seed={seed} must be a whole number.")
    require_whole("num_images", num_images, 2)
    require_whole("batch_size", batch_size, 1)


def measure_sweep(
    trainings: Sequence[SweepTraining],
    folder: Path,
    *,
    device: torch.device,
    features: str = "efficientnet_lite",
    target_psnr_db: float = 25.0,
    num_images: int = 2048,
    seed: int = 0,
    batch_size: int = 64,
) -> SweepReport:
    """Measure every run on the same held-out images, beside PCAs of the sizes between them.

    Raises:
        UserError: runs on different images; what `measure_reconstructions` refuses.
    """
    runs = [Run.open(training.folder(folder)) for training in trainings]
    for run in runs[1:]:
        if run.facts["data_fingerprint"] != runs[0].facts["data_fingerprint"]:
            raise UserError(
                f"{run.path} was trained on other images than {runs[0].path}: they changed in between. Choose another "
                "name= and train them all again."
            )
    options: dict[str, Any] = {"features": features, "num_images": num_images, "seed": seed, "batch_size": batch_size}
    rows = []
    for number, (training, run) in enumerate(zip(trainings, runs, strict=True), start=1):
        print(f"measuring {number} of {len(runs)}: {training.name}", flush=True)
        report = reconstruction_report.measure_reconstructions(run, device=device, **options)
        report.save(run.path)
        rows.append(_sweep_row(training, run, report.content))
    pca: dict[str, Any] = {}
    for factor in sorted({training.size.factor for training in trainings}):
        most = max(training.size.channels for training in trainings if training.size.factor == factor)
        pca[str(factor)] = _pca_of_factor(
            runs[0], factor, most, num_images=num_images, seed=seed, batch_size=batch_size
        )
    images = runs[0].image_data()
    advice = recommend_size(rows, target_psnr_db)
    chosen = next(training for training in trainings if training.name == advice["name"])
    return SweepReport(
        {
            "images": f"{images.name}/val@{images.fingerprint[:8]}",
            "resolution": images.resolution,
            **options,
            "num_images": report.content["num_images"],
            "target_psnr_db": target_psnr_db,
            "rows": rows,
            "pca": pca,
            "recommendation": {**advice, **follow_up_commands(chosen, folder)},
        }
    )


def _sweep_row(training: SweepTraining, run: Run, measured: Mapping[str, Any]) -> dict[str, Any]:
    channels, height, width = run.facts["latent_shape"]
    values, done = channels * height * width, run.facts["figures"]
    return {
        "name": training.name,
        "run": str(run.path),
        "size": str(training.size),
        "factor": training.size.factor,
        "loss": training.loss,
        "latent_shape": [channels, height, width],
        "num_values": values,
        "compression": 3 * (height * training.size.factor) ** 2 / values,
        **metrics_to_json({"psnr_db": measured["psnr_db"]}),
        "pca_psnr_db": measured["pca_psnr_db"],
        "ssim": measured["ssim"].value,
        "kl_bits": measured["kl_bits"],
        "features_in_loss": measured["features_in_loss"],
        "gain_db": measured["psnr_db"].value - measured["pca_psnr_db"],
        "fd": measured["fd_reconstructions"].value if "fd_reconstructions" in measured else None,
        "fd_components": measured.get("fd_components"),
        **metrics_to_json({"kd": measured.get("kd_reconstructions", UNMEASURED)}),
        "steps": done["steps"],
        "minutes": done["training_s"] / 60,
    }


def _pca_of_factor(
    run: Run, factor: int, channels: int, *, num_images: int, seed: int, batch_size: int
) -> dict[str, Any]:
    """Held-out PSNR by the number of components of f x f patches, without the number that loses nothing."""
    images, indices = choose_images(run, "val", num_images, seed)
    train = np.sort(images.train_indices[:PCA_IMAGES])
    found = patch_components(track_batches(images, train, batch_size, f"PCA, f = {factor}"), factor)
    counts = [count for count in spectrum.pca_counts(3 * factor**2, channels) if count < 3 * factor**2]
    parts = track_batches(images, indices, batch_size, f"PCA, f = {factor}")
    curves = torch.cat([pca_curve(found, part, factor, counts) for part in parts], dim=1)
    locations = (images.resolution // factor) ** 2
    return {"channels": counts, "num_values": [n * locations for n in counts], "psnr_db": curves.mean(1).tolist()}


def _feature_line(row: Mapping[str, Any], features: str, num_images: int) -> str:
    of = f", {row['fd_components']} components" if row["fd_components"] else ""
    return f"FD ({features}{of}) and KD ({features}): {num_images} reconstructions against the images themselves."


def _format_cell(value: Any, form: str, mark: str) -> str:
    if value is None:
        return "-"
    return (" x ".join(map(str, value)) if isinstance(value, list) else f"{value:{form}}") + mark


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
    what = f"{chosen['size']} ({chosen['num_values']} values per image), trained with the {chosen['loss']} loss"
    if reached:
        text = (
            f"{what}: {chosen['psnr_db']:.2f} dB on held-out images, with the fewest values of those that reach "
            f"target_psnr_db={target_psnr_db:g}. Fewer values are easier for stage 2."
        )
    else:
        text = (
            f"{what}: no size reaches target_psnr_db={target_psnr_db:g}, and this one comes closest with "
            f"{chosen['psnr_db']:.2f} dB. Try more minutes=, more channels or a smaller f."
        )
    if chosen["gain_db"] < 0:
        text += f" It is {-chosen['gain_db']:.1f} dB below a PCA of its size: its training has not paid yet."
    text += _compare_losses(of_size)
    return {"rule": "smallest" if reached else "best", "size": chosen["size"], "name": chosen["name"], "text": text}


def _compare_losses(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which loss has the lower FD, of the runs of one size; nothing where there is only one, or no FD."""
    if len(rows) < 2 or any(row["fd"] is None for row in rows):
        return ""
    low, *others = sorted(rows, key=lambda row: row["fd"])
    against = ", ".join(f"{row['fd']:.3g} with {row['loss']}" for row in others)
    text = f" Of its losses {low['loss']} has the lower FD: {low['fd']:.3g}, against {against}"
    if any(row["features_in_loss"] for row in rows):
        return f"{text}. But these features are in a loss, so this proves nothing: choose features= that no loss saw."
    return f"{text}, of one training each."


def follow_up_commands(training: SweepTraining, folder: Path) -> dict[str, str]:
    """The same size trained for longer, and stage 2 on the run of the sweep."""
    spent = next(o for o in training.overrides if o.startswith("trainer.max_time="))
    hours, minutes, seconds = map(int, spent.partition("=")[2].split(":"))
    longer = f"trainer.max_time={format_duration(min(LONGER * (60 * hours + minutes + seconds / 60), MOST_MINUTES))}"
    overrides = [longer if override == spent else override for override in training.overrides]
    return {
        "train": shell.train_command("stage=vae", f"name={training.name}", *overrides),
        "next": Run.open(training.folder(folder)).next_training(),
    }
