"""examples.mixture.mixture against quadrature, autograd and torch.distributions; what is sampled, counted and drawn."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from examples.mixture.mixture import ExactDenoiser, ascend, descend, five_modes, mean_loss, train
from examples.mixture.study import count_modes, study
from ldm.diffusion import chain
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
STEPS = [1, 20, 80, 150, 200]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(count: int, seed: int = 0) -> torch.Tensor:
    return 1.5 * torch.randn(count, 2, generator=seeded(seed), dtype=torch.float64)


def grid(low: float = -7.0, high: float = 7.0, count: int = 301) -> tuple[torch.Tensor, float]:
    """The points of a square and the area that each stands for: the trapezoid rule, exact to rounding here."""
    line = torch.linspace(low, high, count, dtype=torch.float64)
    return torch.cartesian_prod(line, line), ((high - low) / (count - 1)) ** 2


def independent(t: int) -> MixtureSameFamily:
    """q(z_t), put together by torch."""
    a = SCHEDULE.alpha_bar[t]
    covariance = (a * MIXTURE.variance + 1 - a) * torch.eye(2, dtype=torch.float64)
    return MixtureSameFamily(Categorical(MIXTURE.weights), MultivariateNormal(a.sqrt() * MIXTURE.means, covariance))


def test_the_five_modes_are_standardised_and_unequal():
    mean = MIXTURE.weights @ MIXTURE.means
    variance = MIXTURE.weights @ MIXTURE.means.square() + MIXTURE.variance
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)
    assert variance.mean().item() == pytest.approx(1) and variance.min() > 0.7
    assert (MIXTURE.means[:, 0].diff() > 4 * MIXTURE.variance**0.5).all(), "apart on the first axis"
    assert len(MIXTURE.weights.unique()) == 5


def test_samples_come_from_their_modes():
    z_0, mode = MIXTURE.sample(20_000, seeded())
    assert count_modes(MIXTURE, SCHEDULE, z_0)["p_value"] > 1e-3
    assert (MIXTURE.mode_of(SCHEDULE, z_0) == mode).double().mean() > 0.999
    spread = (z_0 - MIXTURE.means.float()[mode]).square().mean()
    assert spread.item() == pytest.approx(MIXTURE.variance, rel=0.03)


@pytest.mark.parametrize("t", [0, *STEPS])
def test_the_density_integrates_to_one(t):
    where, area = grid()
    assert MIXTURE.log_density(SCHEDULE, where, t).exp().sum().item() * area == pytest.approx(1, abs=1e-9)


def test_the_density_is_that_of_torch_with_a_step_of_its_own_for_each_sample():
    z_t, t = points(6), torch.tensor([0, *STEPS])
    expected = torch.stack([independent(int(step)).log_prob(z) for z, step in zip(z_t, t, strict=True)])
    torch.testing.assert_close(MIXTURE.log_density(SCHEDULE, z_t, t), expected)


@pytest.mark.parametrize("t", STEPS[1:])
def test_the_exact_denoiser_is_the_posterior_mean_by_quadrature(t):
    """Bayes on a grid over z_0, whatever the formula says."""
    z_0, _ = grid(-3.5, 3.5)
    prior, a = independent(0).log_prob(z_0), SCHEDULE.alpha_bar[t]
    z_t = points(8, seed=t)
    likelihood = -(z_t[:, None] - a.sqrt() * z_0).square().sum(-1) / (2 * (1 - a))
    expected = (prior + likelihood).softmax(-1) @ z_0
    torch.testing.assert_close(EXACT(z_t, t).z_0, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("t", STEPS)
def test_the_exact_denoiser_is_the_gradient_of_the_density(t):
    """Tweedie's formula."""
    z_t = points(50).requires_grad_()
    (gradient,) = torch.autograd.grad(MIXTURE.log_density(SCHEDULE, z_t, t).sum(), z_t)
    torch.testing.assert_close(chain.score(SCHEDULE, EXACT(z_t.detach(), t).z_0, z_t.detach(), t), gradient)


def test_the_exact_denoiser_is_one_and_takes_a_step_per_sample():
    z_t, t = points(5), torch.tensor(STEPS)
    assert isinstance(EXACT, DenoiserLike)
    expected = torch.cat([EXACT(z[None], int(step)).z_0 for z, step in zip(z_t, t, strict=True)])
    torch.testing.assert_close(EXACT(z_t, t).z_0, expected)
    torch.testing.assert_close(EXACT(z_t.float(), t).z_0, expected.float())


def test_the_forward_chain_widens_every_mode_as_told():
    z_0, mode = MIXTURE.sample(20_000, seeded())
    frames = ascend(SCHEDULE, z_0, [0, *STEPS], seeded(1))
    assert list(frames) == [0, *STEPS] and torch.equal(frames[0], z_0)
    for t, z_t in frames.items():
        a = SCHEDULE.alpha_bar[t].item()
        std = (a * MIXTURE.variance + 1 - a) ** 0.5
        standard = (z_t - a**0.5 * MIXTURE.means.float()[mode]) / std
        for k in range(5):
            part = standard[mode == k]
            assert part.mean(0).abs().max() < 5 / len(part) ** 0.5
            assert (part.var(0) - 1).abs().max() < 5 * (2 / len(part)) ** 0.5


@pytest.mark.parametrize("sampler", [DDPM, DDIM])
def test_the_reverse_chain_finds_every_mode_with_its_weight(sampler):
    generator = seeded(2)
    z_T = torch.randn(4000, 2, generator=generator)
    descent = descend(EXACT, sampler(200), z_T, generator)
    found = count_modes(MIXTURE, SCHEDULE, descent.z_0)
    assert found["p_value"] > 1e-3 and min(found["counts"]) > 0 and found["stray"] < 0.005
    assert descent.steps == list(range(200, -1, -1)) and descent.paths.shape == (201, 60, 2)
    assert list(descent.frames)[0] == 0 and list(descent.frames)[-1] == 200
    assert torch.equal(descent.frames[200], z_T) and torch.equal(descent.frames[0], descent.z_0)
    assert torch.equal(descent.paths[:, 0][-1], descent.z_0[0])


def test_a_short_way_down_is_looked_at_where_it_stops():
    z_T = torch.randn(100, 2, generator=seeded())
    descent = descend(EXACT, DPMSolver(4), z_T, seeded())
    assert descent.steps == [200, 150, 100, 50, 0] and set(descent.frames) <= set(descent.steps)


def test_counting():
    counts = [120, 350, 200, 250, 80]
    z_0 = MIXTURE.means.float().repeat_interleave(torch.tensor(counts), 0)
    found = count_modes(MIXTURE, SCHEDULE, z_0)
    assert found["counts"] == counts and found["shares"] == pytest.approx(MIXTURE.weights.tolist())
    assert found["p_value"] == pytest.approx(1) and found["stray"] == 0
    assert found["standard_errors"][1] == pytest.approx((0.35 * 0.65 / 1000) ** 0.5)
    z_0[-40:] = MIXTURE.means[0].float() - torch.tensor([5 * MIXTURE.variance**0.5, 0])  # astray, left of mode 1
    found = count_modes(MIXTURE, SCHEDULE, z_0)
    assert found["counts"] == [160, 350, 200, 250, 40] and found["stray"] == 0.04
    half = (40**2 / 120 + 40**2 / 80) / 2
    assert found["chi_square"] == pytest.approx(2 * half)
    assert found["p_value"] == pytest.approx(math.exp(-half) * (1 + half)), "chi-square of four degrees of freedom"


def test_a_network_learns_the_modes_and_their_weights():
    state = torch.get_rng_state()
    trained = train(MIXTURE, SCHEDULE, steps=600, batch_size=256)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    barely, least = (mean_loss(denoiser, MIXTURE) for denoiser in (train(MIXTURE, SCHEDULE, steps=1), EXACT))
    loss = mean_loss(trained, MIXTURE)
    assert least < loss < least + 0.2 * (barely - least)
    generator = seeded(3)
    z_0 = descend(trained, DDPM(200), torch.randn(2000, 2, generator=generator), generator).z_0
    found = count_modes(MIXTURE, SCHEDULE, z_0)
    assert found["shares"] == pytest.approx(MIXTURE.weights.tolist(), abs=0.05)
    assert found["stray"] < 0.1


def test_a_study_repeats_itself():
    options = {"steps": 20, "num_samples": 70, "seed": 3}
    (figures, _), (again, _) = (study(SCHEDULE, DDPM(20), **options) for _ in range(2))
    first, second = ({k: v for k, v in x["trained"].items() if k != "sampling_s"} for x in (figures, again))
    assert first == second and sum(first["counts"]) == 70
    assert [figures[key] for key in ("T", "schedule", *options)] == [200, "cosine", *options.values()]
    assert figures["sampler"]["method"] == "ddpm" and figures["sampler"]["steps"] == 20
    assert figures["stray_of_data"] == pytest.approx(math.exp(-8))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_samples": 62}, "num_samples=62 must be 63 or more"),
        ({"steps": 0}, "steps=0 must be 1 or more"),
        ({"sampler": DDPM(1000)}, "sampler=ddpm with 1000 steps: a chain of T = 200 steps"),
        ({"sampler": DDPM(10, variance="learned_range")}, "sampler.variance=learned_range"),
    ],
)
def test_what_cannot_be_studied_is_refused(changed, message):
    with pytest.raises(UserError, match=message):
        study(SCHEDULE, **{"sampler": DDPM(200), "steps": 1, "num_samples": 63, **changed})


def test_the_tool(tmp_path):
    options = ["steps=10", "num_samples=70", "schedule.num_steps=50", "sampler.steps=20", "out=my pictures"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert "exact denoiser" in done.stdout and "chi-square p" in done.stdout
    assert sorted(path.name for path in (tmp_path / "my pictures").iterdir()) == ["mixture.json", "mixture.png"]
    figures = json.loads((tmp_path / "my pictures/mixture.json").read_text(encoding="utf-8"))
    assert (figures["T"], figures["sampler"]["steps"], figures["steps"]) == (50, 20, 10)
