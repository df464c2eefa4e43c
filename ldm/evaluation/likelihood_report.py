"""The likelihood of a run's images as people read it: a table, a JSON, and the bound layer by layer as a picture."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from ldm.data.images import ImageData
from ldm.data.order import derive_seed
from ldm.diffusion.bound import fit_z_0_mse
from ldm.errors import UserError
from ldm.evaluation.likelihood import Terms, TwoStage, mean_and_error, two_stage_bound, vae_bound
from ldm.evaluation.likelihood_picture import draw
from ldm.networks.conditioning import ClassCondition, Condition, TextCondition
from ldm.pipeline import LatentDiffusionPipeline, save_z_0_mse
from ldm.run import Run

SPLITS = ("val", "train")
FITTED_IMAGES = 1024
BOUND_ROWS = {
    "decoder": "-log p(x | z_raw), the decoder",
    "encoder": "log q(z_raw | x), the encoder's entropy",
    "L_T": "L_T, what is left at t = T",
    "sum of L_t-1": "sum of L_t-1, t = 2..T",
    "ODE, z_1": "-log p(z_1), probability-flow ODE",
    "L_0": "L_0, the last step",
    "N(0, I) prior": "-log N(z_raw; 0, I), no chain",
}


@dataclass(frozen=True)
class Report:
    """Figures for likelihood.json, and the terms behind them by column of the table."""

    figures: dict[str, Any]
    columns: dict[str, Terms]

    def table(self) -> Table:
        """Bits per dimension of every term, one column per prior of the latent."""
        images, of = self.figures["num_images"], self.figures["num_dims"]
        table = Table(title=f"bits/dim of {images} images ({of} dimensions each)", title_justify="left")
        table.add_column("term")
        for name in self.columns:
            table.add_column(name, justify="right")
        figures = {name: terms.figures() for name, terms in self.columns.items()}
        for key, label in BOUND_ROWS.items():
            if any(key in found for found in figures.values()):
                table.add_row(label, *(f"{found[key]:.4f}" if key in found else "" for found in figures.values()))
        table.add_section()
        table.add_row("total", *(f"[bold]{found['total']:.4f}[/bold]" for found in figures.values()))
        table.add_row(
            "standard error, between images", *(f"{found['standard_error']:.4f}" for found in figures.values())
        )
        errors = [
            f"{found['monte_carlo_error']:.4f}" if "monte_carlo_error" in found else "" for found in figures.values()
        ]
        if any(errors):
            table.add_row("standard error, of t and noise", *errors)
        return table

    def save(self, folder: Path) -> tuple[Path, Path]:
        """likelihood.json and likelihood.png."""
        data, picture = folder / "likelihood.json", folder / "likelihood.png"
        data.write_text(json.dumps(self.figures, indent=2) + "\n", encoding="utf-8")
        title = f"{self.figures['images']}, {self.figures['num_images']} images"
        draw(self.columns, title).savefig(picture, dpi=130)
        return data, picture


def measure(
    run: Run,
    *,
    device: torch.device,
    split: str = "val",
    num_images: int = 256,
    steps: int | None = None,
    variance: str | None = None,
    ode: dict[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Report:
    """The bound of a run's images; a run of stage vae has its own, with the prior N(0, I).

    Args:
        split: val or train; `num_images` of it at most, chosen by the seed.
        steps: Terms of the chain per image; None: all T.
        variance: Sigma of the reverse chain; None: the model's own; optimal is fitted on the training split first.
        ode: Options of `ode_log_likelihood`; None: no ODE.

    Raises:
        UserError: an unknown split, or what `two_stage_bound` refuses.
    """
    if split not in SPLITS:
        raise UserError(f"split={split} is unknown. Choose one of: {', '.join(SPLITS)}.")
    if num_images < 2:
        raise UserError(f"num_images={num_images} must be at least 2, for a standard error.")
    started = time.perf_counter()
    images = run.image_data()
    members = images.val_indices if split == "val" else images.train_indices
    indices = np.random.default_rng(derive_seed(seed, 2)).permutation(members)[:num_images]
    pixels = images.batch(indices)
    figures: dict[str, Any] = {
        "run": str(run.path),
        "images": f"{images.name}/{split}@{images.fingerprint[:8]}",
        "num_images": len(pixels),
        "num_dims": pixels[0].numel(),
        "unit": "bits per dimension of the 8-bit image",
        "seed": seed,
    }
    if run.stage == "vae":
        terms = vae_bound(run.autoencoder().to(device), pixels, seed=seed, batch_size=batch_size)
        columns = {"VAE": terms}
    else:
        pipeline = run.pipeline().to(device)
        chosen = variance or pipeline.variance
        with _progress() as bar:
            if chosen == "optimal" and pipeline.z_0_mse is None:
                fit_optimal(pipeline, images, run.path / "pipeline", seed=seed, batch_size=batch_size, bar=bar)
            found = two_stage_bound(
                pipeline,
                pixels,
                condition_of(pipeline, images, indices),
                seed=seed,
                variance=chosen,
                steps=steps,
                batch_size=batch_size,
                ode=ode,
                on_progress=_Bars(bar),
            )
        columns = {"chain": found.chain} | ({} if found.ode is None else {"ODE": found.ode}) | {"VAE": found.vae}
        figures |= {
            "condition": pipeline.conditioning.kind,
            "variance": chosen,
            "num_steps": pipeline.schedule.num_steps,
            "steps": "all" if steps is None else steps,
            **_chain_figures(found, ode),
        }
    figures |= {name: terms.figures() for name, terms in columns.items()}
    figures["per_image"] = {name: terms.bits_per_dim(terms.total).tolist() for name, terms in columns.items()}
    figures["per_image"]["index"] = indices.tolist()
    figures["seconds"] = round(time.perf_counter() - started, 1)
    return Report(figures, columns)


def compare(report: Report, other: Report) -> dict[str, float]:
    """The mean of report - other over the images, in bits/dim, and its standard error: paired, image by image.

    Raises:
        UserError: they are of other images.
    """
    one, two = report.figures, other.figures
    if one["images"] != two["images"] or one["per_image"]["index"] != two["per_image"]["index"]:
        raise UserError(
            f"{one['run']} was measured on {one['num_images']} images of {one['images']}, {two['run']} on "
            f"{two['num_images']} of {two['images']}. A paired difference needs the same images."
        )
    (first, *_), (second, *_) = report.columns.values(), other.columns.values()
    mean, error = mean_and_error(first.bits_per_dim(first.total - second.total))
    return {"mean": mean, "standard_error": error}


def _chain_figures(found: TwoStage, ode: dict[str, Any] | None) -> dict[str, Any]:
    chain = found.chain.chain
    assert chain is not None
    dims = found.chain.num_dims
    curve = [found.chain.bits_per_dim(chain.curve).tolist(), chain.steps.tolist(), chain.widths.tolist()]
    figures: dict[str, Any] = {"curve": dict(zip(("bits_per_dim_of_one_t", "t", "width"), curve, strict=True))}
    if found.ode is not None:
        difference, error = mean_and_error(found.chain.bits_per_dim(found.ode.total - found.chain.total))
        figures["ode_options"] = {**(ode or {}), "evaluations": found.ode_evaluations}
        figures["ode_minus_chain"] = {"mean": difference, "standard_error": error, "paired": True, "num_dims": dims}
    return figures


def condition_of(pipeline: LatentDiffusionPipeline, images: ImageData, indices: np.ndarray) -> Condition:
    """The images' own captions or classes, as the network takes them."""
    conditioning = pipeline.conditioning
    if isinstance(conditioning, TextCondition):
        captions = images.require_captions()
        return conditioning.encode([captions[i] for i in indices])
    if isinstance(conditioning, ClassCondition):
        labels = images.require_labels()
        return conditioning.encode([labels[i] for i in indices])
    return {}


def fit_optimal(
    pipeline: LatentDiffusionPipeline,
    images: ImageData,
    folder: Path,
    *,
    seed: int,
    batch_size: int,
    bar: Progress,
    images_per_step: int = 16,
) -> None:
    """Fit the per-t optimal Sigma on the training split, and keep it in the pipeline's folder."""
    indices = np.random.default_rng(derive_seed(seed, 3)).permutation(images.train_indices)[:FITTED_IMAGES]
    generator = torch.Generator().manual_seed(derive_seed(seed, 3))
    latents = []
    for part in images.batch(indices).split(batch_size):
        mean, log_variance = (moment.cpu() for moment in pipeline.autoencoder.encode(part))
        latents.append(mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator))
    z_0: Tensor = pipeline.autoencoder.standardise(torch.cat(latents))
    report = _Bars(bar)
    pipeline.network.eval()
    moved = {name: value.to(pipeline.device) for name, value in condition_of(pipeline, images, indices).items()}
    pipeline.z_0_mse = fit_z_0_mse(
        pipeline.denoiser(),
        z_0.to(pipeline.device),
        moved,
        generator=generator,
        images_per_step=images_per_step,
        batch_size=batch_size,
        on_batch=lambda done, total: report("fitting Sigma", done, total),
    )
    made_by = {"images": len(indices), "images_per_step": images_per_step, "seed": seed, "data": images.fingerprint}
    save_z_0_mse(folder, pipeline.z_0_mse, made_by)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        transient=True,
    )


class _Bars:
    """A bar for each thing that reports its progress."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.tasks:
            self.tasks[what] = self.bar.add_task(what, total=total)
        self.bar.update(self.tasks[what], completed=done)
