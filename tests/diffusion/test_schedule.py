import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from ldm.diffusion.schedule import NoiseSchedule, cosine, linear, rectified_flow, scaled_linear

CONSTRUCTORS = [linear, scaled_linear, cosine, rectified_flow]


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
@pytest.mark.parametrize("num_steps", [1, 2, 1000])
def test_table_runs_from_one_strictly_down(constructor, num_steps):
    schedule = constructor(num_steps=num_steps)
    assert schedule.num_steps == num_steps
    assert schedule.alpha_bar.dtype == torch.float64
    assert schedule.alpha_bar[0] == 1
    assert (schedule.alpha_bar.diff() < 0).all()
    assert schedule.name == constructor.__name__


@pytest.mark.parametrize(
    ("constructor", "options"),
    [
        (linear, {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        (scaled_linear, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        (cosine, {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_equals_diffusers(constructor, options):
    theirs = DDPMScheduler(**options)
    torch.testing.assert_close(constructor().betas.float(), theirs.betas, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(constructor().alpha_bar[1:].float(), theirs.alphas_cumprod, rtol=2e-3, atol=1e-6)


def test_cosine_is_the_closed_form_below_the_cap():
    u = np.arange(1000) / 1000
    f = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(cosine().alpha_bar[:1000], f / f[0], rtol=1e-10)
    assert cosine().betas[-1].item() == pytest.approx(0.999)


def test_rectified_flow_is_a_straight_path_up_to_scale():
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    a = rectified_flow(100).alpha_bar
    assert a[-1] == 0
    torch.testing.assert_close(a.sqrt() * u, (1 - a).sqrt() * (1 - u))


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_betas_rebuild_the_table(constructor):
    schedule = constructor(num_steps=100)
    assert len(schedule.betas) == 100
    torch.testing.assert_close((1 - schedule.betas).cumprod(0), schedule.alpha_bar[1:])


def test_at_broadcasts_and_keeps_the_digits_that_float32_loses():
    schedule = linear(20_000, beta_start=1e-9, beta_end=1e-3)
    z = torch.zeros(3, 4, 8, 8)
    assert schedule.at(5, z).shape == (1, 1, 1, 1)
    per_sample = schedule.at(torch.tensor([0, 1, 20_000]), z)
    assert per_sample.shape == (3, 1, 1, 1)
    torch.testing.assert_close(per_sample.flatten(), schedule.alpha_bar[[0, 1, 20_000]])
    sigma = (1 - schedule.at(1, z)).sqrt().to(z)
    assert sigma.dtype == torch.float32
    assert sigma.item() == pytest.approx(math.sqrt(1e-9), rel=1e-6)


def test_snr():
    schedule = rectified_flow(4)
    expected = torch.tensor([torch.inf, 9.0, 1.0, 1 / 9, 0.0], dtype=torch.float64)
    torch.testing.assert_close(schedule.snr(torch.arange(5)), expected)
    assert schedule.snr(2).item() == pytest.approx(1)


def test_to_keeps_the_table_in_float64():
    moved = linear(4).to("cpu")
    assert moved.name == "linear"
    assert moved.alpha_bar.dtype == torch.float64
    assert moved.alpha_bar.equal(linear(4).alpha_bar)


@pytest.mark.parametrize("t", [-1, 5, torch.tensor([0, 5]), torch.tensor([-1, 2])])
def test_steps_outside_the_chain_are_refused(t):
    with pytest.raises(ValueError, match=r"steps 0\.\.4; got t = "):
        linear(4).at(t, torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("alpha_bar", "rule"),
    [
        (torch.tensor([1.0, 0.5]), "must be float64"),
        (torch.tensor([1.0], dtype=torch.float64), r"shape \[T \+ 1\]"),
        (torch.ones(2, 2, dtype=torch.float64), r"shape \[T \+ 1\]"),
        (torch.tensor([0.9, 0.5], dtype=torch.float64), r"\[0\] must be 1"),
        (torch.tensor([1.0, 0.5, 0.5, 0.1], dtype=torch.float64), r"alpha_bar\[1\] = 0.5"),
        (torch.tensor([1.0, 0.5, -0.1], dtype=torch.float64), "at least 0"),
        (torch.tensor([1.0, torch.nan, 0.5], dtype=torch.float64), "strictly decreasing"),
    ],
)
def test_a_table_that_is_none_is_refused(alpha_bar, rule):
    with pytest.raises(ValueError, match=rule):
        NoiseSchedule("bad", alpha_bar)


def test_betas_outside_their_range_are_refused():
    with pytest.raises(ValueError, match="strictly decreasing"):
        linear(4, beta_start=0.0)
    with pytest.raises(ValueError, match="at least 0"):
        linear(2, beta_end=1.5)
