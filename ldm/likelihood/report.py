"""Likelihood report for a run's images: a table, a JSON file and a figure."""

import time
from typing import Any

import numpy as np
import torch
from rich.table import Table

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.errors import UserError
from ldm.likelihood.checks import check_chain, require_density
from ldm.likelihood.figure import plot_likelihood
from ldm.likelihood.optimal_variance import fit_optimal_variance
from ldm.likelihood.two_stage import Terms, TwoStageBounds, two_stage_bound, vae_bound
from ldm.metrics.metric import mean_metric
from ldm.metrics.report import Report
from ldm.progress import ProgressBars, progress
from ldm.rules import Count, checked
from ldm.runs.lineage import run_weights_sha256
from ldm.runs.run import Run, choose_images
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.request import Request

BOUND_ROWS = {
    "decoder": "-log p(x | z_raw), decoder",
    "encoder": "log q(z_raw | x), encoder",
    "volume": "h w sum log std, standardisation",
    "L_T": "L_T, KL to the prior at t = T",
    "sum of L_t-1": "sum of L_t-1, t = 2..T",
    "ODE, z_1": "log q(z_1 | z_0) / p(z_1), ODE",
    "L_0": "L_0, last step",
    "N(0, I) prior": "-log N(z_raw; 0, I), no chain",
    "total": "total",
    "standard_error": "standard error over images",
    "monte_carlo_error": "standard error due to random t and noise",
}
"""Labels of the table's rows, by key in likelihood.json."""


def likelihood_table(content: dict[str, Any], columns: dict[str, Any]) -> Table:
    """Return a table with every term in bits per dimension, and one column per prior on the latent."""
    num_images, num_dims = content["num_images"], content["num_dims"]
    table = Table("term", title=f"bits/dim for {num_images} images ({num_dims} dimensions each)", title_justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    for key, label in BOUND_ROWS.items():
        if any(key in terms for terms in columns.values()):
            table.add_row(label, *(f"{terms[key]:.4f}" if key in terms else "" for terms in columns.values()))
    return table


def add_difference(report: Report, baseline: Report) -> str:
    """Add the paired difference from a baseline report on the same images to `report`, and return it as text.

    The difference is between the first columns of the two reports.
    """
    bits, baseline_bits = (next(iter(each.content["per_image"].values())) for each in (report, baseline))
    difference = paired_difference(bits, baseline_bits)
    report.content["difference"] = difference | {"against": baseline.content}
    return format_difference(difference)


def paired_difference(bits: list[float], baseline: list[float]) -> dict[str, Any]:
    """Return the mean and standard error of bits - baseline over the same images, in bits/dim."""
    difference = mean_metric(torch.tensor(bits, dtype=torch.float64) - torch.tensor(baseline, dtype=torch.float64))
    return {"mean": difference.value, "standard_error": difference.standard_error}


def format_difference(difference: dict[str, Any]) -> str:
    """Format the result of `paired_difference`."""
    return f"paired by image: {difference['mean']:+.4f} ± {difference['standard_error']:.4f} bits/dim"


def _terms_to_json(terms: Terms) -> dict[str, Any]:
    metrics, error = terms.metrics(), terms.monte_carlo_error
    values: dict[str, Any] = {name: metric.value for name, metric in metrics.items()}
    values["standard_error"] = metrics["total"].standard_error
    return values if error is None else {**values, "monte_carlo_error": error}


@checked
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
    batch_size: Count = 64,
) -> Report:
    """Compute the likelihood bound on a run's images. For a VAE run, the prior is N(0, I).

    Args:
        split: 'val' or 'train'.
        num_images: Maximum number of images; the seed determines which ones.
        steps: Number of chain terms per image; None for all T.
        variance: Choice of Sigma for the reverse chain; None for the model's default. With 'optimal', Sigma is first
            fitted on the training split, unless the model already contains a fitted Sigma.
        ode: Options of `ode_log_likelihood`; None to skip the ODE.

    Raises:
        UserError: see `choose_images`, `open_model` and `two_stage_bound`.
    """
    start_time = time.perf_counter()
    images, indices = choose_images(run, split, num_images, seed)
    model = open_model(run, variance, steps, ode).to(device)
    pixels = images.batch(indices)
    content: dict[str, Any] = {
        "run": str(run.path),
        "weights_sha256": run_weights_sha256(run),
        "images": f"{images.name}/{split}@{images.fingerprint[:8]}",
        "num_images": len(pixels),
        "num_dims": pixels[0].numel(),
        "unit": "bits per dimension of the 8-bit image",
        "seed": seed,
    }
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
    if isinstance(model, Autoencoder):
        columns = {"VAE": vae_bound(model, pixels, **options)}
    else:
        variance = variance or model.variance
        condition = Request.for_images(model, images, indices).condition
        with progress() as bar:
            if variance == "optimal" and model.z_0_mse is None:
                fit_optimal_variance(model, images, run.pipeline_folder, bar=bar, **options)
            options |= {"variance": variance, "steps": steps, "ode": ode}
            bounds = two_stage_bound(model, pixels, condition, on_progress=ProgressBars(bar), **options)
        priors = {"chain": bounds.chain, "ODE": bounds.ode, "VAE": bounds.vae}
        columns = {name: terms for name, terms in priors.items() if terms is not None}
        content |= {"condition": model.conditioning.kind, "variance": variance, "num_steps": model.schedule.num_steps}
        content |= {"steps": "all" if steps is None else steps, **_chain_content(bounds, ode)}
    bits, lines = {name: terms.bits_per_dim(terms.total).tolist() for name, terms in columns.items()}, []
    if "ODE" in columns:
        difference = paired_difference(bits["ODE"], bits["chain"])
        content["ode_minus_chain"] = difference | {"paired": True, "num_dims": content["num_dims"]}
        lines.append(f"ODE minus chain, {format_difference(difference)}")
    values = {name: _terms_to_json(terms) for name, terms in columns.items()}
    content |= {**values, "per_image": {**bits, "index": indices.tolist()}}
    content["seconds"] = round(time.perf_counter() - start_time, 1)
    figure = plot_likelihood(columns, f"{content['images']}, {len(pixels)} images")
    return Report("likelihood.json", content, likelihood_table(content, values), lines, {"likelihood.png": figure})


def open_model(
    run: Run, variance: str | None, steps: int | None, ode: dict[str, Any] | None
) -> LatentDiffusion | Autoencoder:
    """Load the model to evaluate: the autoencoder of a VAE run, otherwise the diffusion pipeline.

    Raises:
        UserError: if variance or ode is given for a VAE run, which has no chain; see also `check_chain`.
    """
    if run.stage == "vae":
        if variance is not None or ode is not None:
            option = "ode=true" if ode is not None else f"variance={variance}"
            raise UserError(f"{option} applies only to diffusion chains, but {run.path} is a VAE run. Remove {option}.")
        autoencoder = run.autoencoder()
        require_density(autoencoder)
        return autoencoder
    pipeline = run.pipeline()
    check_chain(pipeline, variance or pipeline.variance, steps, ode)
    return pipeline


def check_comparable(run: Run, baseline: Run, *, variance: str | None, steps: int | None, **selection: Any) -> None:
    """Check that a run can be compared with a baseline run, before any computation.

    Args:
        variance: Choice of Sigma for the baseline run's reverse chain; None for the model's default.
        selection: Arguments of `choose_images`.

    Raises:
        UserError: if the runs use different images; see also `open_model`.
    """
    (images, indices), (base_images, base_indices) = (choose_images(each, **selection) for each in (run, baseline))
    if images.fingerprint != base_images.fingerprint or not np.array_equal(indices, base_indices):
        raise UserError(
            f"{run.path} and against={baseline.path} were not trained and validated on the same images, so a "
            "paired comparison is not possible. Choose a run with the same data options and the same data.val_fraction."
        )
    open_model(baseline, variance, steps, None)


def _chain_content(bounds: TwoStageBounds, ode: dict[str, Any] | None) -> dict[str, Any]:
    chain = bounds.chain.chain
    assert chain is not None
    curve = [bounds.chain.bits_per_dim(chain.curve).tolist(), chain.steps.tolist(), chain.widths.tolist()]
    content: dict[str, Any] = {"curve": dict(zip(("bits_per_dim_of_one_t", "t", "width"), curve, strict=True))}
    if bounds.ode is not None:
        content["ode_options"] = {**(ode or {}), "evaluations": bounds.num_ode_evaluations}
        if bounds.ode_probe_variance is not None:
            standard_error = bounds.ode_probe_variance.sum().sqrt() / len(bounds.ode_probe_variance)
            content["ode_options"]["probe_error"] = bounds.chain.bits_per_dim(standard_error).item()
    return content
