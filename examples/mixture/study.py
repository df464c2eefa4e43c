"""Train a network on the mixture, sample with it, and compare the frequency of each mode with the mode's weight."""

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

from examples.mixture.figure import NUM_POINTS, plot_chains
from examples.mixture.mixture import (
    ExactDenoiser,
    Mixture,
    five_modes,
    mean_loss,
    run_forward_chain,
    run_reverse_chain,
    train,
)
from ldm.cli.main import construct
from ldm.diffusion.denoiser import DenoiserLike
from ldm.diffusion.samplers.base import SamplerLike
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.metrics.report import Report
from ldm.rules import Count, Integer, Seed, checked
from ldm.runtime.device import choose_device
from ldm.runtime.random import torch_generator
from ldm.sampling.draw import check_sampler, sampler_settings

STRAY_STD = 4.0
"""A sample is stray if it is more than this many standard deviations from the mean of its mode."""


def mixture(config: DictConfig) -> None:
    """Entry point of `python examples/mixture/run.py`."""
    options = {key: config[key] for key in ("steps", "num_samples", "seed")}
    results, figure = study(
        construct(config.schedule), construct(config.sampler), device=choose_device(config.device), **options
    )
    out = Path(config.out).expanduser()
    report = Report("mixture.json", results, mode_table(results), figures={"mixture.png": figure})
    json_file, figure_file = report.save(out)
    report.print()
    print(f"figure of both chains: {figure_file}; all metrics: {json_file}")


@checked
def study(
    schedule: NoiseSchedule,
    sampler: SamplerLike,
    *,
    steps: Count,
    num_samples: Annotated[Integer, Field(ge=63)],  # the chi-square test needs an expected count of 5 or more per mode
    seed: Seed = 0,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Any], Figure]:
    """Train a network on the mixture, sample with it and with the exact denoiser, and count the samples in each mode.

    Both denoisers use the same initial noise and the same noise along the chain.

    Returns:
        Settings and metrics by name, and a figure of both chains.

    Raises:
        UserError: If there are too few samples, or if the noise schedule or the network does not support the sampler.
    """
    mixture = five_modes()
    check_sampler(sampler, schedule)
    if sampler.variance in ("learned_range", "optimal"):
        raise UserError(
            f"sampler.variance={sampler.variance} is not supported by this example. Choose fixed_small or fixed_large."
        )
    start_time = time.perf_counter()
    network = train(mixture, schedule, steps=steps, seed=seed, device=device)
    training_s = time.perf_counter() - start_time
    denoisers: dict[str, DenoiserLike] = {"exact": ExactDenoiser(schedule, mixture), "trained": network}
    chains, metrics = {}, {}
    for name, denoiser in denoisers.items():
        generator = torch_generator(seed, 3)
        z_T = torch.randn(num_samples, mixture.means.shape[1], generator=generator).to(device)
        start_time = time.perf_counter()
        chains[name] = run_reverse_chain(denoiser, sampler, z_T, generator, f"sampling ({name})")
        metrics[name] = {
            "sampling_s": time.perf_counter() - start_time,
            "loss": mean_loss(denoiser, mixture, seed=seed, device=device),
            **count_modes(mixture, schedule, chains[name].z_0),
        }
    final_modes = [mixture.most_likely_mode(schedule, chains[name].z_0) for name in denoisers]
    results = {
        "seed": seed,
        "steps": steps,
        "num_samples": num_samples,
        "T": schedule.num_steps,
        "schedule": schedule.name,
        "sampler": sampler_settings(sampler),
        "device": str(device),
        "training_s": training_s,
        "stray_of_data": float(chi2.sf(STRAY_STD**2, mixture.means.shape[1])),
        "means": mixture.means.tolist(),
        "weights": mixture.weights.tolist(),
        "variance": mixture.variance,
        **metrics,
        "same_mode": (final_modes[0] == final_modes[1]).double().mean().item(),
    }
    generator = torch_generator(seed, 4)
    z_0, initial_mode = mixture.sample(min(NUM_POINTS, num_samples), generator)
    forward = run_forward_chain(schedule, z_0, list(chains["trained"].snapshots), generator)
    return results, plot_chains(mixture, schedule, forward, initial_mode, chains["trained"])


def count_modes(mixture: Mixture, schedule: NoiseSchedule, z_0: Tensor) -> dict[str, Any]:
    """Count the samples in each mode, and compare the counts with the weights using Pearson's chi-square test.

    `stray` is the fraction of samples that are more than STRAY_STD standard deviations from the mean of their mode.
    """
    mode = mixture.most_likely_mode(schedule, z_0)
    counts = mode.bincount(minlength=len(mixture.weights))
    shares = counts.double() / len(z_0)
    distance = (z_0 - mixture.means.to(z_0)[mode]).norm(dim=1)
    test = chisquare(counts.numpy(), mixture.weights.numpy() * len(z_0))
    return {
        "counts": counts.tolist(),
        "shares": shares.tolist(),
        "standard_errors": (shares * (1 - shares) / len(z_0)).sqrt().tolist(),
        "chi_square": float(test.statistic),
        "p_value": float(test.pvalue),
        "stray": (distance > STRAY_STD * mixture.variance**0.5).double().mean().item(),
    }


def mode_table(results: dict[str, Any]) -> Table:
    """Return a table with the weight and the sample fractions of each mode, followed by the overall metrics."""
    table = Table(title=f"{results['num_samples']} samples, {results['sampler']}, T = {results['T']}")
    for name in ("mode", "true weight", "exact denoiser", "trained network"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    columns = [results["exact"], results["trained"]]
    for mode, weight in enumerate(results["weights"]):
        shares = (f"{metrics['shares'][mode]:.1%} +- {metrics['standard_errors'][mode]:.1%}" for metrics in columns)
        table.add_row(str(mode + 1), f"{weight:.1%}", *shares, end_section=mode + 1 == len(results["weights"]))
    table.add_row("chi-square p", "", *(f"{metrics['p_value']:.3g}" for metrics in columns))
    stray_shares = (results["stray_of_data"], *(metrics["stray"] for metrics in columns))
    table.add_row(f"beyond {STRAY_STD:g} std", *(f"{share:.2%}" for share in stray_shares))
    table.add_row("L_simple in v", "", *(f"{metrics['loss']:.4f}" for metrics in columns))
    return table
