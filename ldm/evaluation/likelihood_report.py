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

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.data.images import ImageData
from ldm.data.order import derive_seed
from ldm.diffusion.bound import fit_z_0_mse
from ldm.errors import UserError
from ldm.evaluation.likelihood import (
    Terms,
    TwoStage,
    check_chain,
    draw_latents,
    mean_and_error,
    require_density,
    two_stage_bound,
    vae_bound,
)
from ldm.evaluation.likelihood_picture import draw
from ldm.evaluation.run_images import choose_images
from ldm.pipeline import LatentDiffusionPipeline, save_z_0_mse
from ldm.run import Run
from ldm.sampling import Request

FITTED_IMAGES = 1024
BOUND_ROWS = {
    "decoder": "-log p(x | z_raw), the decoder",
    "encoder": "log q(z_raw | x), the encoder",
    "volume": "h w sum log std, the standardisation",
    "L_T": "L_T, what is left at t = T",
    "sum of L_t-1": "sum of L_t-1, t = 2..T",
    "ODE, z_1": "log q(z_1 | z_0) / p(z_1), the ODE",
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
        UserError: what `choose_images`, `open_model` and `two_stage_bound` refuse.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be a whole number of 1 at least.")
    started = time.perf_counter()
    images, indices = choose_images(run, split, num_images, seed)
    model = open_model(run, variance, steps, ode)
    model.to(device)
    pixels = images.batch(indices)
    figures: dict[str, Any] = {
        "run": str(run.path),
        "images": f"{images.name}/{split}@{images.fingerprint[:8]}",
        "num_images": len(pixels),
        "num_dims": pixels[0].numel(),
        "unit": "bits per dimension of the 8-bit image",
        "seed": seed,
    }
    if isinstance(model, Autoencoder):
        columns = {"VAE": vae_bound(model, pixels, seed=seed, batch_size=batch_size)}
    else:
        chosen = variance or model.variance
        with _progress() as bar:
            if chosen == "optimal" and model.z_0_mse is None:
                fit_optimal(model, images, run.path / "pipeline", seed=seed, batch_size=batch_size, bar=bar)
            found = two_stage_bound(
                model,
                pixels,
                Request.of_images(model, images, indices).condition,
                seed=seed,
                variance=chosen,
                steps=steps,
                batch_size=batch_size,
                ode=ode,
                on_progress=_Bars(bar),
            )
        named = {"chain": found.chain, "ODE": found.ode, "VAE": found.vae}
        columns = {name: terms for name, terms in named.items() if terms is not None}
        figures |= {
            "condition": model.conditioning.kind,
            "variance": chosen,
            "num_steps": model.schedule.num_steps,
            "steps": "all" if steps is None else steps,
            **_chain_figures(found, ode),
        }
    figures |= {name: terms.figures() for name, terms in columns.items()}
    figures["per_image"] = {name: terms.bits_per_dim(terms.total).tolist() for name, terms in columns.items()}
    figures["per_image"]["index"] = indices.tolist()
    figures["seconds"] = round(time.perf_counter() - started, 1)
    return Report(figures, columns)


def open_model(
    run: Run, variance: str | None, steps: int | None, ode: dict[str, Any] | None
) -> LatentDiffusionPipeline | Autoencoder:
    """What a run trained, when it can answer this.

    Raises:
        UserError: as `check_chain` does; a run of stage vae, which has no chain, is asked about it.
    """
    if run.stage == "vae":
        if variance is not None or ode is not None:
            asked = "ode=true" if ode is not None else f"variance={variance}"
            raise UserError(f"{asked} is about the chain, but {run.path} is a run of stage=vae: leave it out.")
        autoencoder = run.autoencoder()
        require_density(autoencoder)
        return autoencoder
    pipeline = run.pipeline()
    check_chain(pipeline, variance or pipeline.variance, steps, ode)
    if variance == "optimal" and pipeline.z_0_mse is not None:
        pipeline.require_fitted()
    return pipeline


def check_comparable(
    run: Run, other: Run, *, variance: str | None, split: str, num_images: int, seed: int, steps: int | None
) -> None:
    """Refuse a comparison, before anything is measured, that the other run could not answer.

    Args:
        variance: Sigma of the other run's chain.

    Raises:
        UserError: the runs are of other images, or as `open_model` does.
    """
    (ours, indices), (theirs, other_indices) = (choose_images(one, split, num_images, seed) for one in (run, other))
    if ours.fingerprint != theirs.fingerprint or not np.array_equal(indices, other_indices):
        raise _of_other_images(str(run.path), str(other.path))
    open_model(other, variance, steps, None)


def compare(report: Report, other: Report) -> dict[str, float]:
    """The mean of report - other over the images, in bits/dim, and its standard error: paired, image by image.

    Raises:
        UserError: they are of other images.
    """
    one, two = report.figures, other.figures
    if one["images"] != two["images"] or one["per_image"]["index"] != two["per_image"]["index"]:
        raise _of_other_images(one["run"], two["run"])
    (first, *_), (second, *_) = report.columns.values(), other.columns.values()
    mean, error = mean_and_error(first.bits_per_dim(first.total - second.total))
    return {"mean": mean, "standard_error": error}


def _of_other_images(run: str, other: str) -> UserError:
    return UserError(
        f"{run} and against={other} were not trained and validated on the same images, which a paired difference "
        "needs. Choose a run with the same data= options and the same data.val_fraction."
    )


def _chain_figures(found: TwoStage, ode: dict[str, Any] | None) -> dict[str, Any]:
    chain = found.chain.chain
    assert chain is not None
    dims = found.chain.num_dims
    curve = [found.chain.bits_per_dim(chain.curve).tolist(), chain.steps.tolist(), chain.widths.tolist()]
    figures: dict[str, Any] = {"curve": dict(zip(("bits_per_dim_of_one_t", "t", "width"), curve, strict=True))}
    if found.ode is not None:
        difference, error = mean_and_error(found.chain.bits_per_dim(found.ode.total - found.chain.total))
        figures["ode_options"] = {**(ode or {}), "evaluations": found.ode_evaluations}
        if found.ode_probe_variance is not None:
            of_the_mean = found.ode_probe_variance.sum().sqrt() / len(found.ode_probe_variance)
            figures["ode_options"]["probe_error"] = found.chain.bits_per_dim(of_the_mean).item()
        figures["ode_minus_chain"] = {"mean": difference, "standard_error": error, "paired": True, "num_dims": dims}
    return figures


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
    """Fit the per-t optimal Sigma on the training split, and keep it in the pipeline's folder.

    Raises:
        UserError: an answer of the autoencoder or the network is not finite.
    """
    indices = np.random.default_rng(derive_seed(seed, 3)).permutation(images.train_indices)[:FITTED_IMAGES]
    generator = torch.Generator().manual_seed(derive_seed(seed, 3))
    latents: list[Tensor] = []
    for start in range(0, len(indices), batch_size):
        part = images.batch(indices[start : start + batch_size])
        latents.append(draw_latents(pipeline.autoencoder, part, [generator] * len(part))[2])
    z_0 = pipeline.autoencoder.standardise(torch.cat(latents))
    report = _Bars(bar)
    pipeline.network.eval()
    request = Request.of_images(pipeline, images, indices)
    moved = {name: value.to(pipeline.device) for name, value in request.condition.items()}
    try:
        pipeline.z_0_mse = fit_z_0_mse(
            pipeline.denoiser(),
            z_0.to(pipeline.device),
            moved,
            generator=generator,
            images_per_step=images_per_step,
            batch_size=batch_size,
            on_batch=lambda done, total: report("fitting Sigma", done, total),
        )
    except ValueError as error:
        raise UserError(f"variance=optimal cannot be fitted: {error}. Choose another variance.") from error
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
