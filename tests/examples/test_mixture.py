"""Tests of the mixture example: its closed forms, its sampling and its script.

The closed forms are compared with quadrature, automatic differentiation and torch.distributions.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from examples.mixture.mixture import (
    ExactDenoiser,
    five_modes,
    mean_loss,
    run_forward_chain,
    run_reverse_chain,
    train,
)
from examples.mixture.study import count_modes, study
from ldm.diffusion.chain import score
from ldm.diffusion.denoiser import DenoiserLike
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.ddpm import DDPM
from ldm.diffusion.samplers.multistep import DPMSolver
from ldm.diffusion.schedule import cosine
from ldm.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "mixture" / "run.py"
SCHEDULE = cosine(200)
MIXTURE = five_modes()
EXACT = ExactDenoiser(SCHEDULE, MIXTURE)
TIMES = [1, 20, 80, 150, 200]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_points(count: int, seed: int = 0) -> torch.Tensor:
    return 1.5 * torch.randn(count, 2, generator=seeded(seed), dtype=torch.float64)


def quadrature_grid(low: float = -7.0, high: float = 7.0, count: int = 301) -> tuple[torch.Tensor, float]:
    """Return the points of a square grid and the area of a cell, for the trapezoid rule."""
    line = torch.linspace(low, high, count, dtype=torch.float64)
    return torch.cartesian_prod(line, line), ((high - low) / (count - 1)) ** 2


def torch_mixture(t: int) -> MixtureSameFamily:
    """Return q(z_t) as a torch distribution."""
    a = SCHEDULE.alpha_bar[t]
    covariance = (a * MIXTURE.variance + 1 - a) * torch.eye(2, dtype=torch.float64)
    return MixtureSameFamily(Categorical(MIXTURE.weights), MultivariateNormal(a.sqrt() * MIXTURE.means, covariance))


def test_five_modes_are_standardised_and_have_distinct_weights():
    mean = MIXTURE.weights @ MIXTURE.means
    variance = MIXTURE.weights @ MIXTURE.means.square() + MIXTURE.variance
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)
    assert variance.mean().item() == pytest.approx(1) and variance.min() > 0.7
    assert (MIXTURE.means[:, 0].diff() > 4 * MIXTURE.variance**0.5).all(), "separated along the first axis"
    assert len(MIXTURE.weights.unique()) == 5


def test_samples_come_from_their_modes():
    z_0, mode = MIXTURE.sample(20_000, seeded())
    assert count_modes(MIXTURE, SCHEDULE, z_0)["p_value"] > 1e-3
    assert (MIXTURE.most_likely_mode(SCHEDULE, z_0) == mode).double().mean() > 0.999
    spread = (z_0 - MIXTURE.means.float()[mode]).square().mean()
    assert spread.item() == pytest.approx(MIXTURE.variance, rel=0.03)


@pytest.mark.parametrize("t", [0, *TIMES])
def test_density_integrates_to_one(t):
    z_t, area = quadrature_grid()
    assert MIXTURE.log_density(SCHEDULE, z_t, t).exp().sum().item() * area == pytest.approx(1, abs=1e-9)


def test_density_equals_torch_distribution_for_a_batch_of_times():
    z_t, t = random_points(6), torch.tensor([0, *TIMES])
    expected = torch.stack([torch_mixture(int(step)).log_prob(z) for z, step in zip(z_t, t, strict=True)])
    torch.testing.assert_close(MIXTURE.log_density(SCHEDULE, z_t, t), expected)


@pytest.mark.parametrize("t", TIMES[1:])
def test_exact_denoiser_equals_posterior_mean_by_quadrature(t):
    """The reference applies Bayes' rule on a grid over z_0."""
    z_0, _ = quadrature_grid(-3.5, 3.5)
    prior, a = torch_mixture(0).log_prob(z_0), SCHEDULE.alpha_bar[t]
    z_t = random_points(8, seed=t)
    likelihood = -(z_t[:, None] - a.sqrt() * z_0).square().sum(-1) / (2 * (1 - a))
    expected = (prior + likelihood).softmax(-1) @ z_0
    torch.testing.assert_close(EXACT(z_t, t).z_0, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("t", TIMES)
def test_exact_score_equals_gradient_of_log_density(t):
    """By Tweedie's formula, the score follows from the posterior mean."""
    z_t = random_points(50).requires_grad_()
    (gradient,) = torch.autograd.grad(MIXTURE.log_density(SCHEDULE, z_t, t).sum(), z_t)
    torch.testing.assert_close(score(SCHEDULE, EXACT(z_t.detach(), t).z_0, z_t.detach(), t), gradient)


def test_exact_denoiser_accepts_one_time_per_sample():
    z_t, t = random_points(5), torch.tensor(TIMES)
    assert isinstance(EXACT, DenoiserLike)
    expected = torch.cat([EXACT(z[None], int(step)).z_0 for z, step in zip(z_t, t, strict=True)])
    torch.testing.assert_close(EXACT(z_t, t).z_0, expected)
    torch.testing.assert_close(EXACT(z_t.float(), t).z_0, expected.float())


def test_forward_chain_has_the_exact_marginal_of_each_mode():
    z_0, mode = MIXTURE.sample(20_000, seeded())
    states = run_forward_chain(SCHEDULE, z_0, [0, *TIMES], seeded(1))
    assert list(states) == [0, *TIMES] and torch.equal(states[0], z_0)
    for t, z_t in states.items():
        a = SCHEDULE.alpha_bar[t].item()
        std = (a * MIXTURE.variance + 1 - a) ** 0.5
        residuals = (z_t - a**0.5 * MIXTURE.means.float()[mode]) / std
        for k in range(5):
            mode_residuals = residuals[mode == k]
            assert mode_residuals.mean(0).abs().max() < 5 / len(mode_residuals) ** 0.5
            assert (mode_residuals.var(0) - 1).abs().max() < 5 * (2 / len(mode_residuals)) ** 0.5


@pytest.mark.parametrize("sampler", [DDPM, DDIM])
def test_reverse_chain_reaches_each_mode_with_its_weight(sampler):
    generator = seeded(2)
    z_T = torch.randn(4000, 2, generator=generator)
    chain = run_reverse_chain(EXACT, sampler(200), z_T, generator)
    metrics = count_modes(MIXTURE, SCHEDULE, chain.z_0)
    assert metrics["p_value"] > 1e-3 and min(metrics["counts"]) > 0 and metrics["stray"] < 0.005
    assert chain.times == list(range(200, -1, -1)) and chain.paths.shape == (201, 60, 2)
    assert list(chain.snapshots)[0] == 0 and list(chain.snapshots)[-1] == 200
    assert torch.equal(chain.snapshots[200], z_T) and torch.equal(chain.snapshots[0], chain.z_0)
    assert torch.equal(chain.paths[:, 0][-1], chain.z_0[0])


def test_snapshots_of_few_steps_are_at_the_visited_times():
    z_T = torch.randn(100, 2, generator=seeded())
    chain = run_reverse_chain(EXACT, DPMSolver(4), z_T, seeded())
    assert chain.times == [200, 150, 100, 50, 0] and set(chain.snapshots) <= set(chain.times)


def test_count_modes():
    counts = [120, 350, 200, 250, 80]
    z_0 = MIXTURE.means.float().repeat_interleave(torch.tensor(counts), 0)
    metrics = count_modes(MIXTURE, SCHEDULE, z_0)
    assert metrics["counts"] == counts and metrics["shares"] == pytest.approx(MIXTURE.weights.tolist())
    assert metrics["p_value"] == pytest.approx(1) and metrics["stray"] == 0
    assert metrics["standard_errors"][1] == pytest.approx((0.35 * 0.65 / 1000) ** 0.5)
    z_0[-40:] = MIXTURE.means[0].float() - torch.tensor([5 * MIXTURE.variance**0.5, 0])  # stray samples left of mode 1
    metrics = count_modes(MIXTURE, SCHEDULE, z_0)
    assert metrics["counts"] == [160, 350, 200, 250, 40] and metrics["stray"] == 0.04
    half = (40**2 / 120 + 40**2 / 80) / 2
    assert metrics["chi_square"] == pytest.approx(2 * half)
    assert metrics["p_value"] == pytest.approx(math.exp(-half) * (1 + half)), "four degrees of freedom"


def test_network_learns_the_modes_and_their_weights():
    state = torch.get_rng_state()
    trained = train(MIXTURE, SCHEDULE, steps=600, batch_size=256)
    assert torch.equal(torch.get_rng_state(), state), "the global generator must not be used"
    untrained = train(MIXTURE, SCHEDULE, steps=1)
    untrained_loss, loss, lowest_loss = (mean_loss(denoiser, MIXTURE) for denoiser in (untrained, trained, EXACT))
    assert lowest_loss < loss < lowest_loss + 0.2 * (untrained_loss - lowest_loss)
    generator = seeded(3)
    z_0 = run_reverse_chain(trained, DDPM(200), torch.randn(2000, 2, generator=generator), generator).z_0
    metrics = count_modes(MIXTURE, SCHEDULE, z_0)
    assert metrics["shares"] == pytest.approx(MIXTURE.weights.tolist(), abs=0.05)
    assert metrics["stray"] < 0.1


def test_study_is_reproducible():
    options = {"steps": 20, "num_samples": 70, "seed": 3}
    (results, _), (repeated, _) = (study(SCHEDULE, DDPM(20), **options) for _ in range(2))
    expected, actual = ({k: v for k, v in x["trained"].items() if k != "sampling_s"} for x in (results, repeated))
    assert actual == expected and sum(actual["counts"]) == 70
    assert [results[key] for key in ("T", "schedule", *options)] == [200, "cosine", *options.values()]
    assert results["sampler"]["method"] == "ddpm" and results["sampler"]["steps"] == 20
    assert results["stray_of_data"] == pytest.approx(math.exp(-8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 62}, "num_samples=62.*63 or more"),
        ({"steps": 0}, "steps=0.*1 or more"),
        ({"sampler": DDPM(1000)}, "sampler=ddpm with 1000 steps.*200"),
        ({"sampler": DDPM(10, variance="learned_range")}, "sampler.variance=learned_range.*fixed_small or fixed_large"),
    ],
)
def test_study_rejects_invalid_options(changes, message):
    with pytest.raises(UserError, match=message):
        study(SCHEDULE, **{"sampler": DDPM(200), "steps": 1, "num_samples": 63, **changes})


def test_script_writes_figure_and_metrics(tmp_path):
    options = ["steps=10", "num_samples=70", "schedule.num_steps=50", "sampler.steps=20", "out=my results"]
    process = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert process.returncode == 0 and process.stderr == "", process.stdout + process.stderr
    assert "exact denoiser" in process.stdout and "chi-square p" in process.stdout
    assert sorted(path.name for path in (tmp_path / "my results").iterdir()) == ["mixture.json", "mixture.png"]
    results = json.loads((tmp_path / "my results/mixture.json").read_text(encoding="utf-8"))
    assert (results["T"], results["sampler"]["steps"], results["steps"]) == (50, 20, 10)
