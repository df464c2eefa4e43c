import itertools
from dataclasses import asdict

import numpy as np
import pytest
import scipy.stats
import torch

from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.samplers.base import timesteps
from ldm.diffusion.samplers.ddim import DDIM, ddim_step
from ldm.diffusion.samplers.ddpm import DDPM, ddpm_step
from ldm.diffusion.samplers.multistep import DPMSolver, UniPC
from ldm.diffusion.schedule import NoiseSchedule, cosine, linear, rectified_flow

SAMPLERS = [DDPM, DDIM, DPMSolver, UniPC]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_samples_match_moments_of_data(exact_gaussian, randn, variance):
    schedule = linear(1000)
    exact = exact_gaussian(schedule, 0.7, 0.3, dimensions=4)
    sampler = DDPM(1000, variance=variance)
    z = sampler(exact, randn(4000, 4, dtype=torch.float32), generator=seeded())
    count = z.numel()
    assert abs(z.mean() - 0.7) < 4 * (0.3 / count) ** 0.5
    # With 1000 steps, the exact variance of the samples differs from the variance of the data by up to 1%.
    assert abs(z.var() / 0.3 - 1) < 4 * (2 / count) ** 0.5 + 0.01


@pytest.mark.parametrize(("variance", "data_variance"), [("fixed_large", 1.0), ("fixed_small", 0.0)])
def test_fixed_variances_are_exact_for_matching_data(exact_gaussian, randn, variance, data_variance):
    # At any stride, 'fixed_large' is the true reverse variance for data N(0, I), and 'fixed_small' for a single point.
    schedule = linear(1000)
    mean = 0.0 if data_variance else 0.5
    exact = exact_gaussian(schedule, mean, data_variance)
    moments = {}
    DDPM(5, variance=variance)(
        exact,
        randn(200_000, 1),
        generator=seeded(),
        on_step=lambda s, z_s, z_0: moments.update({s: (z_s.mean(), z_s.var())}),
    )
    assert list(moments) == [800, 600, 400, 200, 0]
    for s in (800, 600, 400, 200):
        a = schedule.alpha_bar[s]
        expected_variance = a * data_variance + 1 - a
        assert abs(moments[s][1] / expected_variance - 1) < 5 * (2 / 200_000) ** 0.5
        assert abs(moments[s][0] - a.sqrt() * mean) < 5 * (expected_variance / 200_000) ** 0.5 + 4e-3 * mean


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_optimal_variance_is_exact_at_any_stride(exact_gaussian, randn, steps):
    # The last transition returns the mean without noise, so the final variance is too small by mse(t).
    schedule, mean, c = linear(1000, 1e-4, 0.05), 0.5, 0.3
    a = schedule.alpha_bar
    table = c * (1 - a) / (a * c + 1 - a)
    moments = {}
    DDPM(steps, variance="optimal")(
        exact_gaussian(schedule, mean, c),
        randn(200_000, 1),
        z_0_mse=table,
        generator=seeded(),
        on_step=lambda s, z_s, z_0: moments.update({s: (z_s.mean(), z_s.var())}),
    )
    for t, s in itertools.pairwise(timesteps(1000, steps)):
        expected_variance = a[s] * c + 1 - a[s] - (table[t] if s == 0 else 0)
        assert abs(moments[s][1] - expected_variance) < 5 * expected_variance * (2 / 200_000) ** 0.5 + 1e-4
        assert abs(moments[s][0] - a[s].sqrt() * mean) < 5 * (expected_variance / 200_000) ** 0.5 + 1e-4


@pytest.mark.parametrize("learns_variance", [True, False])
def test_default_variance_is_learned_range_if_denoiser_returns_v(exact_gaussian, randn, learns_variance):
    exact, z_T = exact_gaussian(linear(100), 0.5, 0.2), randn(4, 1)

    class GaussianDenoiser:
        schedule = exact.schedule

        def __call__(self, z_t, t, condition=None):
            z_0 = exact(z_t, t).z_0
            return Prediction(z_0, torch.full_like(z_0, 0.3) if learns_variance else None)

    samples = {
        variance: DDPM(5, variance=variance)(GaussianDenoiser(), z_T, generator=seeded())
        for variance in (None, "fixed_small", *(["learned_range"] if learns_variance else []))
    }
    assert samples[None].equal(samples["learned_range" if learns_variance else "fixed_small"])
    assert not learns_variance or not samples[None].equal(samples["fixed_small"])


@pytest.mark.parametrize(("sampler", "steps"), [(DDPM, 200), (DDIM, 100), (DPMSolver, 50), (UniPC, 50)])
def test_samples_reach_each_mode_with_its_weight(exact_mixture, randn, sampler, steps):
    means = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.5, 1.5]])
    weights = [0.1, 0.2, 0.3, 0.4]
    exact = exact_mixture(cosine(), means, weights, variance=0.01)
    z = sampler(steps)(exact, randn(5000, 2, dtype=torch.float32), generator=seeded())
    distance, mode = torch.cdist(z, means).min(1)
    assert distance.max() < 6 * 0.1
    counts = torch.bincount(mode, minlength=4).numpy()
    assert scipy.stats.chisquare(counts, 5000 * np.array(weights)).pvalue > 1e-3


@pytest.mark.parametrize("schedule", [cosine(), rectified_flow()], ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_few_steps_reproduce_moments_of_gaussian_data(exact_gaussian, randn, schedule, sampler):
    exact = exact_gaussian(schedule, 0.7, 0.3)
    z = sampler(50)(exact, randn(20_000, 1, dtype=torch.float32), generator=seeded())
    assert z.mean().item() == pytest.approx(0.7, abs=0.02)
    assert z.var().item() == pytest.approx(0.3, rel=0.13 if sampler in (DDPM, DDIM) else 0.04)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_timesteps_decrease_strictly_to_zero(spacing):
    for num_steps in (1, 2, 3, 10, 37):
        for steps in range(1, num_steps + 1):
            visited = timesteps(num_steps, steps, spacing)
            assert len(visited) == steps + 1
            assert visited[0] <= num_steps
            assert visited[-1] == 0
            assert all(t > s for t, s in zip(visited, visited[1:], strict=False))
        if spacing != "leading":
            assert timesteps(num_steps, 1, spacing) == [num_steps, 0]


@pytest.mark.parametrize(("s", "t"), [(0, 1), (0, 40), (39, 40), (7, 60), (30, 100)])
@pytest.mark.parametrize("schedule", [linear(100), rectified_flow(100)], ids=lambda schedule: schedule.name)
def test_ddim_at_eta_1_equals_ddpm(schedule, s, t, randn):
    z_0, z_t = randn(3, 2), randn(3, 2)
    ddim = ddim_step(schedule, z_0, z_t, s=s, t=t, eta=1.0, generator=seeded())
    ddpm = ddpm_step(schedule, z_0, z_t, s=s, t=t, variance="fixed_small", generator=seeded())
    torch.testing.assert_close(ddim, ddpm)
    if s == 0:
        torch.testing.assert_close(ddpm, z_0)


@pytest.mark.parametrize("sampler", [DDPM(10), DDIM(10, eta=1.0)])
def test_each_sample_depends_only_on_its_generator(exact_gaussian, randn, sampler):
    exact, z_T = exact_gaussian(linear(100), 0.5, 0.2, dimensions=3), randn(5, 3, dtype=torch.float32)
    batched = sampler(exact, z_T, generator=[seeded(i) for i in range(5)])
    for i in range(5):
        single = sampler(exact, z_T[i : i + 1], generator=[seeded(i)])
        assert batched[i].equal(single[0])
    pair = sampler(exact, z_T[[3, 1]], generator=[seeded(3), seeded(1)])
    assert pair.equal(batched[[3, 1]])
    assert not batched.equal(sampler(exact, z_T, generator=[seeded(i + 5) for i in range(5)]))


@pytest.mark.parametrize("sampler", [DDIM, DPMSolver, UniPC])
def test_deterministic_samplers_do_not_use_generator(exact_gaussian, randn, sampler):
    generator = seeded()
    initial_state = generator.get_state()
    sampler(5)(exact_gaussian(linear(100), 0.5, 0.2), randn(2, 1), generator=generator)
    assert generator.get_state().equal(initial_state)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_on_step_is_called_after_every_transition(exact_gaussian, randn, sampler):
    calls = []
    z = sampler(4)(
        exact_gaussian(linear(100), 0.5, 0.2),
        randn(2, 1),
        generator=seeded(),
        on_step=lambda s, z_s, z_0: calls.append((s, z_s, z_0)),
    )
    assert [s for s, _, _ in calls] == [75, 50, 25, 0]
    assert calls[-1][1].equal(z)
    torch.testing.assert_close(z, calls[-1][2])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_clip_bounds_samples_and_half_precision_becomes_float32(exact_gaussian, randn, sampler, steps):
    z_T = randn(50, 1).bfloat16()
    z = sampler(steps, clip=0.6)(exact_gaussian(linear(100), 0.5, 1.0), z_T, generator=seeded())
    assert z.dtype == torch.float32
    assert z.abs().max().item() == pytest.approx(0.6, abs=1e-5)


def test_samplers_pass_condition_and_build_no_autograd_graph(randn):
    calls = []

    class RecordingDenoiser:
        schedule = linear(100)

        def __call__(self, z_t, t, condition=None):
            calls.append((t, condition))
            return Prediction(z_t * scale, None)

    scale = torch.ones((), requires_grad=True)
    condition = {"label": torch.tensor([1, 2])}
    z = DDIM(2)(RecordingDenoiser(), randn(2, 3), condition)
    assert calls == [(100, condition), (50, condition)]
    assert not z.requires_grad


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (UniPC, {"spacing": "karras"}, "spacing.*'karras'.*trailing, leading, linspace"),
        (DDPM, {"variance": "learned"}, "variance.*'learned'.*fixed_small"),
        (DDIM, {"eta": 1.5}, r"eta=1\.5.*1 or less"),
        (DDIM, {"steps": 0}, "steps=0.*1 or more"),
        (DPMSolver, {"clip": 0.0}, r"clip=0\.0.*above 0"),
    ],
)
def test_invalid_options_raise(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        sampler(**{"steps": 10, **options})


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("option", "owner"), [("eta", DDIM), ("variance", DDPM)])
def test_samplers_reject_options_of_other_samplers(sampler, option, owner):
    if sampler is owner:
        assert option in asdict(sampler(10))
    else:
        with pytest.raises(TypeError, match=f"keyword argument '{option}'"):
            sampler(10, **{option: None})


def test_invalid_calls_raise(exact_gaussian, randn):
    exact, z_T = exact_gaussian(linear(100), 0.5, 0.2), randn(3, 1)
    with pytest.raises(ValueError, match=r"1 to 100 steps.*\b101\b"):
        DDIM(101)(exact, z_T)
    assert DDIM(100).check(exact.schedule) is None
    with pytest.raises(ValueError, match=r"1 to 100 steps.*\b101\b"):
        DDIM(101).check(exact.schedule)
    with pytest.raises(ValueError, match="optimal.*z_0_mse"):
        DDPM(5, variance="optimal")(exact, z_T)
    with pytest.raises(ValueError, match=r"2 generators.*batch of 3\b"):
        DDPM(5)(exact, z_T, generator=[seeded(0), seeded(1)])
    with pytest.raises(ValueError, match=r"learned_range.*\bv\b"):
        DDPM(5, variance="learned_range")(exact, z_T)
    with pytest.raises(ValueError, match="spacing.*'even'.*trailing"):
        timesteps(100, 10, "even")
    with pytest.raises(ValueError, match=r"0 <= s < t <= T = 100\b.*s = 5, t = 5\b"):
        ddim_step(linear(100), z_T, z_T, s=5, t=5)
    noise_only = NoiseSchedule("noise_only", torch.tensor([1, 0.5, 1e-30, 1e-40], dtype=torch.float64))
    with pytest.raises(ValueError, match="dpmpp.*noise_only.*1e-20.*ddim"):
        DPMSolver(3)(exact_gaussian(noise_only, 0.5, 0.2), z_T)
