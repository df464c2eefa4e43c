import math

import numpy as np
import pytest
import scipy.integrate
import torch
from diffusers import DDPMScheduler

from ldm.diffusion.schedule import NoiseSchedule, cosine, linear, rectified_flow, scaled_linear

CONSTRUCTORS = [linear, scaled_linear, cosine, rectified_flow]


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
@pytest.mark.parametrize("num_steps", [1, 2, 1000])
def test_table_decreases_strictly_from_one(constructor, num_steps):
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
def test_schedules_equal_diffusers(constructor, options):
    scheduler = DDPMScheduler(**options)
    torch.testing.assert_close(constructor().betas.float(), scheduler.betas, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(constructor().alpha_bar[1:].float(), scheduler.alphas_cumprod, rtol=2e-3, atol=1e-6)


def test_cosine_matches_closed_form_below_beta_cap():
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
def test_betas_reproduce_the_table(constructor):
    schedule = constructor(num_steps=100)
    assert len(schedule.betas) == 100
    torch.testing.assert_close((1 - schedule.betas).cumprod(0), schedule.alpha_bar[1:])


def test_at_broadcasts_and_keeps_float64_precision():
    schedule = linear(20_000, beta_start=1e-9, beta_end=1e-3)
    z = torch.zeros(3, 4, 8, 8)
    assert schedule.at(5, z).shape == (1, 1, 1, 1)
    a_t = schedule.at(torch.tensor([0, 1, 20_000]), z)
    assert a_t.shape == (3, 1, 1, 1)
    torch.testing.assert_close(a_t.flatten(), schedule.alpha_bar[[0, 1, 20_000]])
    sigma = (1 - schedule.at(1, z)).sqrt().to(z)
    assert sigma.dtype == torch.float32
    assert sigma.item() == pytest.approx(math.sqrt(1e-9), rel=1e-6)


def test_snr_matches_reference_values():
    schedule = rectified_flow(4)
    expected = torch.tensor([torch.inf, 9.0, 1.0, 1 / 9, 0.0], dtype=torch.float64)
    torch.testing.assert_close(schedule.snr(torch.arange(5)), expected)
    assert schedule.snr(2).item() == pytest.approx(1)


def test_moving_a_schedule_keeps_its_table_in_float64():
    schedule = linear(4).to("cpu")
    assert schedule.name == "linear"
    assert schedule.alpha_bar.dtype == torch.float64
    assert schedule.alpha_bar.equal(linear(4).alpha_bar)


@pytest.mark.parametrize("t", [-1, 5, torch.tensor([0, 5]), torch.tensor([-1, 2])])
def test_steps_outside_the_chain_are_rejected(t):
    with pytest.raises(ValueError, match=r"linear.*0\.\.4\b.*t = "):
        linear(4).at(t, torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("alpha_bar", "message"),
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
def test_invalid_table_is_rejected(alpha_bar, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule("bad", alpha_bar)


def test_betas_out_of_range_are_rejected():
    with pytest.raises(ValueError, match="strictly decreasing"):
        linear(4, beta_start=0.0)
    with pytest.raises(ValueError, match="at least 0"):
        linear(2, beta_end=1.5)


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_real_t_with_integer_value_returns_table_entry(constructor):
    schedule, z = constructor(), torch.zeros(1000, 2)
    steps = torch.arange(1, 1001)
    for real_t in (steps.float(), steps.double()):
        assert schedule.at(real_t, z).flatten().equal(schedule.alpha_bar[1:])
    assert schedule.at(7.0, z).shape == (1, 1)
    assert schedule.at(7.0, z).item() == schedule.alpha_bar[7].item()
    assert schedule.snr(7.0).equal(schedule.snr(7))
    assert schedule.snr(torch.tensor([7.0, 1000.0])).equal(schedule.snr(torch.tensor([7, 1000])))
    assert schedule.at(7.5, z).dtype == schedule.rate(7.5).dtype == torch.float64


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_interpolated_alpha_bar_decreases_smoothly(constructor):
    schedule = constructor(num_steps=50)
    t = torch.linspace(1, 50, 4901, dtype=torch.float64)
    a = schedule.at(t, t)
    assert (a.diff() < 0).all()
    assert (schedule.rate(t) >= 0).all()
    knots = torch.arange(2.0, 50.0, dtype=torch.float64)
    left, right = schedule.rate(knots - 1e-9), schedule.rate(knots + 1e-9)
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(schedule.rate(torch.arange(2, 50)), left, rtol=1e-6, atol=1e-12)
    assert schedule.rate(7).shape == ()


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_rate_integrates_to_log_alpha_bar_ratio(constructor):
    schedule = constructor(num_steps=20)
    a = schedule.alpha_bar.clamp(min=1e-20)
    for s, t in [(1, 2), (1, 13), (4, 19), (19, 20)]:
        integral = sum(scipy.integrate.quad(schedule.rate, k, k + 1, epsabs=0)[0] for k in range(s, t))
        assert integral == pytest.approx((a[s] / a[t]).log().item(), rel=1e-8)


def test_curve_converges_to_continuous_schedule():
    # For a(u) = exp(-(0.1 u + 9.95 u^2)), d log a / du is known. u starts at 0.05 because log-SNR diverges at u = 0.
    u = np.linspace(0.05, 1, 4001)
    a, b = np.exp(-(0.1 * u + 9.95 * u**2)), 0.1 + 19.9 * u
    errors = []
    for num_steps in (50, 100, 200, 400, 800):
        grid = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        schedule = NoiseSchedule("vp", torch.exp(-(0.1 * grid + 9.95 * grid**2)))
        t = torch.from_numpy(u * num_steps).clamp(max=num_steps)
        interpolated = schedule.at(t, t).numpy(), num_steps * schedule.rate(t).numpy()
        errors.append([np.abs(interpolated[0] - a).max(), np.abs(interpolated[1] / b - 1).max()])
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    print(f"\nT = 50..800: errors of a {np.array(errors)[:, 0]}, orders {orders[:, 0]} (theory 3)")
    print(f"relative errors of b {np.array(errors)[:, 1]}, orders {orders[:, 1]} (theory 2)")
    assert orders[-1, 0] == pytest.approx(3, abs=0.3)
    assert orders[-1, 1] == pytest.approx(2, abs=0.3)
    assert errors[-1][0] < 1e-6


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_time_at_inverts_log_snr_curve(constructor):
    schedule = constructor()
    for t in (1.0, 1.3, 2.0, 70.25, 500.5, 999.0, 999.75, 1000.0):
        assert schedule.time_at(float(schedule.log_snr_curve(t))) == pytest.approx(t, abs=1e-8)
    assert schedule.time_at(100.0) == 1
    assert schedule.time_at(-100.0) == 1000


def test_zero_alpha_bar_is_floored_for_interpolation():
    schedule, t = rectified_flow(10), torch.tensor([9.0, 9.5, 9.99, 10.0], dtype=torch.float64)
    a = schedule.at(t, t)
    assert a[0] == schedule.alpha_bar[9]
    assert a[-1] == 0
    assert (a.diff() < 0).all()
    assert schedule.log_snr_curve(10) == pytest.approx(math.log(1e-20))
    assert schedule.rate(10.0).isfinite()


@pytest.mark.parametrize("t", [0.0, 0.99, 4.01, math.nan, torch.tensor([1.0, 4.5])])
def test_real_times_outside_the_chain_are_rejected(t):
    with pytest.raises(ValueError, match=r"linear.*\[1, 4\].*t = "):
        linear(4).at(t, torch.zeros(2, 1))


def test_chains_that_cannot_be_interpolated_are_rejected():
    with pytest.raises(ValueError, match="linear.*one step.*at least two"):
        linear(1).at(1.0, torch.zeros(2, 1))
    noise_only = NoiseSchedule("noise_only", torch.tensor([1, 0.5, 1e-30, 1e-40], dtype=torch.float64))
    with pytest.raises(ValueError, match="noise_only.*1e-20.*less noise"):
        noise_only.rate(1.5)
    assert noise_only.at(2, torch.zeros(1, 1)).item() == 1e-30
    with pytest.raises(ValueError, match=r"linear.*\[1, 4\].*t = 0"):
        linear(4).rate(0)
    assert linear(2).at(1.5, torch.zeros(1, 1)).item() == pytest.approx(
        1 / (1 + math.exp(-linear(2).alpha_bar[1:].logit().mean()))
    )
