"""The likelihood of a run's images as people read it: a table, a JSON, and the bound layer by layer as a picture."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.errors import UserError
from ldm.likelihood.checks import check_chain, require_density
from ldm.likelihood.figure import plot_likelihood
from ldm.likelihood.optimal_variance import fit_optimal
from ldm.likelihood.two_stage import Terms, TwoStage, mean_and_error, two_stage_bound, vae_bound
from ldm.progress import Bars, progress
from ldm.runs.run import Run, choose_images
from ldm.sampling.pipeline import LatentDiffusionPipeline
from ldm.sampling.request import Request

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
class LikelihoodReport:
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
        plot_likelihood(self.columns, title).savefig(picture, dpi=130)
        return data, picture


def measure_likelihood(
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
) -> LikelihoodReport:
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
        with progress() as bar:
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
                on_progress=Bars(bar),
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
    return LikelihoodReport(figures, columns)


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


def paired_difference(report: LikelihoodReport, other: LikelihoodReport) -> dict[str, float]:
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
