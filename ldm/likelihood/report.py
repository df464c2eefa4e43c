"""The likelihood of a run's images as people read it: a table, a JSON, and the bound layer by layer as a picture."""

import time
from typing import Any

import numpy as np
import torch
from rich.table import Table

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.errors import UserError
from ldm.likelihood.checks import check_chain, require_density
from ldm.likelihood.figure import plot_likelihood
from ldm.likelihood.optimal_variance import fit_optimal
from ldm.likelihood.two_stage import Terms, TwoStage, two_stage_bound, vae_bound
from ldm.metrics.metric import mean_metric
from ldm.metrics.report import Report
from ldm.progress import Bars, progress
from ldm.rules import Count, checked
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
    "total": "total",
    "standard_error": "standard error, between images",
    "monte_carlo_error": "standard error, of t and noise",
}


def likelihood_table(content: dict[str, Any], columns: dict[str, Any]) -> Table:
    """Bits per dimension of every term, one column per prior of the latent."""
    images, of = content["num_images"], content["num_dims"]
    table = Table("term", title=f"bits/dim of {images} images ({of} dimensions each)", title_justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    for key, label in BOUND_ROWS.items():
        if any(key in terms for terms in columns.values()):
            table.add_row(label, *(f"{terms[key]:.4f}" if key in terms else "" for terms in columns.values()))
    return table


def add_difference(report: Report, other: Report) -> str:
    """Add the paired difference from a report on the same images, of the first column of each; returns it in words."""
    first, second = (next(iter(one.content["per_image"].values())) for one in (report, other))
    difference = paired_difference(first, second)
    report.content["difference"] = difference | {"against": other.content}
    return format_difference(difference)


def paired_difference(first: list[float], second: list[float]) -> dict[str, Any]:
    """The mean of first - second in bits/dim, and its standard error: paired, image by image, of the same images."""
    difference = mean_metric(torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64))
    return {"mean": difference.value, "standard_error": difference.standard_error}


def format_difference(difference: dict[str, Any]) -> str:
    """A difference as likelihood.json has it, in words."""
    return f"paired over the images: {difference['mean']:+.4f} ± {difference['standard_error']:.4f} bits/dim"


def _terms_to_json(terms: Terms) -> dict[str, Any]:
    metrics, error = terms.metrics(), terms.monte_carlo_error
    found: dict[str, Any] = {name: metric.value for name, metric in metrics.items()}
    found["standard_error"] = metrics["total"].standard_error
    return found if error is None else {**found, "monte_carlo_error": error}


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
    """The bound of a run's images; a run of stage vae has its own, with the prior N(0, I).

    Args:
        split: val or train; `num_images` of it at most, chosen by the seed.
        steps: Terms of the chain per image; None: all T.
        variance: Sigma of the reverse chain; None: the model's own; optimal is fitted on the training split first.
        ode: Options of `ode_log_likelihood`; None: no ODE.

    Raises:
        UserError: what `choose_images`, `open_model` and `two_stage_bound` refuse.
    """
    started = time.perf_counter()
    images, indices = choose_images(run, split, num_images, seed)
    model = open_model(run, variance, steps, ode).to(device)
    pixels = images.batch(indices)
    content: dict[str, Any] = {
        "run": str(run.path),
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
        chosen = variance or model.variance
        condition = Request.of_images(model, images, indices).condition
        with progress() as bar:
            if chosen == "optimal" and model.z_0_mse is None:
                fit_optimal(model, images, run.pipeline_folder, bar=bar, **options)
            options |= {"variance": chosen, "steps": steps, "ode": ode}
            found = two_stage_bound(model, pixels, condition, on_progress=Bars(bar), **options)
        named = {"chain": found.chain, "ODE": found.ode, "VAE": found.vae}
        columns = {name: terms for name, terms in named.items() if terms is not None}
        content |= {"condition": model.conditioning.kind, "variance": chosen, "num_steps": model.schedule.num_steps}
        content |= {"steps": "all" if steps is None else steps, **_chain_content(found, ode)}
    per_image, lines = {name: terms.bits_per_dim(terms.total).tolist() for name, terms in columns.items()}, []
    if "ODE" in columns:
        difference = paired_difference(per_image["ODE"], per_image["chain"])
        content["ode_minus_chain"] = difference | {"paired": True, "num_dims": content["num_dims"]}
        lines.append(f"ODE minus chain, {format_difference(difference)}")
    terms = {name: _terms_to_json(found) for name, found in columns.items()}
    content |= {**terms, "per_image": {**per_image, "index": indices.tolist()}}
    content["seconds"] = round(time.perf_counter() - started, 1)
    picture = plot_likelihood(columns, f"{content['images']}, {len(pixels)} images")
    return Report("likelihood.json", content, likelihood_table(content, terms), lines, {"likelihood.png": picture})


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
            raise UserError(f"{asked} is about the chain, but {run.path} is a run of stage vae: leave it out.")
        autoencoder = run.autoencoder()
        require_density(autoencoder)
        return autoencoder
    pipeline = run.pipeline()
    check_chain(pipeline, variance or pipeline.variance, steps, ode)
    return pipeline


def check_comparable(run: Run, other: Run, *, variance: str | None, steps: int | None, **chosen: Any) -> None:
    """Refuse a comparison, before anything is measured, that the other run could not answer.

    Args:
        variance: Sigma of the other run's chain.
        chosen: Images, as `choose_images` chooses them.

    Raises:
        UserError: the runs are of other images, or as `open_model` does.
    """
    (ours, indices), (theirs, other_indices) = (choose_images(one, **chosen) for one in (run, other))
    if ours.fingerprint != theirs.fingerprint or not np.array_equal(indices, other_indices):
        raise UserError(
            f"{run.path} and against={other.path} were not trained and validated on the same images, which a paired "
            "difference needs. Choose a run with the same data options and the same data.val_fraction."
        )
    open_model(other, variance, steps, None)


def _chain_content(found: TwoStage, ode: dict[str, Any] | None) -> dict[str, Any]:
    chain = found.chain.chain
    assert chain is not None
    curve = [found.chain.bits_per_dim(chain.curve).tolist(), chain.steps.tolist(), chain.widths.tolist()]
    content: dict[str, Any] = {"curve": dict(zip(("bits_per_dim_of_one_t", "t", "width"), curve, strict=True))}
    if found.ode is not None:
        content["ode_options"] = {**(ode or {}), "evaluations": found.ode_evaluations}
        if found.ode_probe_variance is not None:
            of_the_mean = found.ode_probe_variance.sum().sqrt() / len(found.ode_probe_variance)
            content["ode_options"]["probe_error"] = found.chain.bits_per_dim(of_the_mean).item()
    return content
