"""A mixture through both chains, counted mode by mode against the truth: figures, a table and a picture."""

import time
from pathlib import Path
from typing import Annotated, Any

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from pydantic import Field
from rich.table import Table
from scipy.stats import chi2, chisquare
from torch import Tensor

from examples.mixture.figure import POINTS, draw
from examples.mixture.mixture import ExactDenoiser, Mixture, ascend, descend, five_modes, mean_loss, train
from ldm.cli.main import construct
from ldm.diffusion.denoiser import DenoiserLike
from ldm.diffusion.samplers.base import SamplerLike
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.metrics.report import Report
from ldm.rules import Count, Seed, Whole, checked
from ldm.runtime.device import choose_device
from ldm.runtime.random import torch_generator
from ldm.sampling.draw import check_sampler, describe

STRAY = 4.0
"""A sample is astray that is more standard deviations than this from the centre of its mode."""


def mixture(config: DictConfig) -> None:
    """`python examples/mixture/run.py`."""
    options = {key: config[key] for key in ("steps", "num_samples", "seed")}
    figures, picture = study(
        construct(config.schedule), construct(config.sampler), device=choose_device(config.device), **options
    )
    out = Path(config.out).expanduser()
    report = Report("mixture.json", figures, tabulate(figures), pictures={"mixture.png": picture})
    data, drawn = report.save(out)
    report.print()
    print(f"both chains as a picture: {drawn}; all figures: {data}")


@checked
def study(
    schedule: NoiseSchedule,
    sampler: SamplerLike,
    *,
    steps: Count,
    num_samples: Annotated[Whole, Field(ge=63)],  # five in the rarest mode, as a chi-square test wants
    seed: Seed = 0,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Any], Figure]:
    """Train on the mixture, sample with the network and with the exact denoiser, count the modes.

    Both start from the same noise and draw the same noise on the way.

    Returns:
        All figures by name, and both chains as a picture.

    Raises:
        UserError: too few samples, a sampler that does not fit the chain or the network.
    """
    mixture = five_modes()
    check_sampler(sampler, schedule)
    if sampler.variance in ("learned_range", "optimal"):
        raise UserError(f"sampler.variance={sampler.variance}: Sigma is fixed here. Choose fixed_small or fixed_large.")
    started = time.perf_counter()
    network = train(mixture, schedule, steps=steps, seed=seed, device=device)
    training_s = time.perf_counter() - started
    denoisers: dict[str, DenoiserLike] = {"exact": ExactDenoiser(schedule, mixture), "trained": network}
    descents, measured = {}, {}
    for name, denoiser in denoisers.items():
        generator = torch_generator(seed, 3)
        z_T = torch.randn(num_samples, mixture.means.shape[1], generator=generator).to(device)
        started = time.perf_counter()
        descents[name] = descend(denoiser, sampler, z_T, generator, f"sampling, {name}")
        measured[name] = {
            "sampling_s": time.perf_counter() - started,
            "loss": mean_loss(denoiser, mixture, seed=seed, device=device),
            **count_modes(mixture, schedule, descents[name].z_0),
        }
    ends = [mixture.mode_of(schedule, descents[name].z_0) for name in denoisers]
    figures = {
        "seed": seed,
        "steps": steps,
        "num_samples": num_samples,
        "T": schedule.num_steps,
        "schedule": schedule.name,
        "sampler": describe(sampler),
        "device": str(device),
        "training_s": training_s,
        "stray_of_data": float(chi2.sf(STRAY**2, mixture.means.shape[1])),
        "means": mixture.means.tolist(),
        "weights": mixture.weights.tolist(),
        "variance": mixture.variance,
        **measured,
        "same_mode": (ends[0] == ends[1]).double().mean().item(),
    }
    generator = torch_generator(seed, 4)
    z_0, origin = mixture.sample(min(POINTS, num_samples), generator)
    forward = ascend(schedule, z_0, list(descents["trained"].frames), generator)
    return figures, draw(mixture, schedule, forward, origin, descents["trained"])


def count_modes(mixture: Mixture, schedule: NoiseSchedule, z_0: Tensor) -> dict[str, Any]:
    """How many samples are in each mode, and by Pearson's test how often chance alone is as far from the weights.

    stray is the share of samples more than STRAY standard deviations from the centre of their mode.
    """
    mode = mixture.mode_of(schedule, z_0)
    counts = mode.bincount(minlength=len(mixture.weights))
    share = counts.double() / len(z_0)
    distance = (z_0 - mixture.means.to(z_0)[mode]).norm(dim=1)
    test = chisquare(counts.numpy(), mixture.weights.numpy() * len(z_0))
    return {
        "counts": counts.tolist(),
        "shares": share.tolist(),
        "standard_errors": (share * (1 - share) / len(z_0)).sqrt().tolist(),
        "chi_square": float(test.statistic),
        "p_value": float(test.pvalue),
        "stray": (distance > STRAY * mixture.variance**0.5).double().mean().item(),
    }


def tabulate(figures: dict[str, Any]) -> Table:
    """Weight and shares mode by mode; below them what is said of all."""
    table = Table(title=f"{figures['num_samples']} samples, {figures['sampler']}, T = {figures['T']}")
    for name in ("mode", "true weight", "exact denoiser", "trained network"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    both = [figures["exact"], figures["trained"]]
    for mode, weight in enumerate(figures["weights"]):
        shares = (f"{part['shares'][mode]:.1%} +- {part['standard_errors'][mode]:.1%}" for part in both)
        table.add_row(str(mode + 1), f"{weight:.1%}", *shares, end_section=mode + 1 == len(figures["weights"]))
    table.add_row("chi-square p", "", *(f"{part['p_value']:.3g}" for part in both))
    stray = (figures["stray_of_data"], *(part["stray"] for part in both))
    table.add_row(f"beyond {STRAY:g} std", *(f"{share:.2%}" for share in stray))
    table.add_row("L_simple in v", "", *(f"{part['loss']:.4f}" for part in both))
    return table
