import math

import numpy as np
import pytest
import scipy.stats
import torch

from ldm.diffusion import chain
from ldm.diffusion.continuous import sde
from ldm.diffusion.continuous.clock import clock_ends, clock_nodes, clock_time
from ldm.diffusion.continuous.sde import SDESampler, forward_sde_step, langevin_step, probability_flow, reverse_sde_step
from ldm.diffusion.denoiser import Denoiser, Prediction
from ldm.diffusion.guidance import Guided
from ldm.diffusion.schedule import NoiseSchedule, cosine, linear, rectified_flow

SCHEDULES = [linear(), cosine(), rectified_flow()]
STEPS = [50, 100, 200, 400]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def orders(errors):
    return [math.log2(abs(coarse / fine)) for coarse, fine in zip(errors, errors[1:], strict=False)]


def print_convergence(quantity, errors, theory):
    columns = " ".join(f"{error:+.2e}" for error in errors), " ".join(f"{order:.2f}" for order in orders(errors))
    print(f"\n{quantity}, {STEPS} steps: errors {columns[0]}, orders {columns[1]} (theory {theory})")


@pytest.fixture
def unit_noise(monkeypatch):
    """Replace each noise draw with a new unit vector, so that |z|^2 is the exact variance of a linear scheme."""

    def install(z):
        dimensions = iter(range(1, z.shape[1]))

        def draw(like, generator):
            noise = torch.zeros_like(like)
            noise[0, next(dimensions)] = 1
            return noise

        monkeypatch.setattr(sde, "draw_noise", draw)

    return install


def latent_at_t_min(sampler, exact, z):
    """Return the sampler's latent at t_min, before the last transition."""
    latents = {}
    sampler(exact, z, on_step=lambda s, z_s, z_0: latents.update({s: z_s}))
    return list(latents.values())[-2]


def test_score_and_flow_match_the_marginal(exact_gaussian, randn):
    schedule, z_t = linear(100), randn(4, 2)
    exact = exact_gaussian(schedule, 0.7, 0.3)
    for t in (1.0, 30.5, 100.0):
        a = schedule.at(t, z_t)
        score = -(z_t - a.sqrt() * 0.7) / (a * 0.3 + 1 - a)
        z_0 = exact(z_t, t).z_0
        torch.testing.assert_close(chain.score(schedule, z_0, z_t, t), score)
        torch.testing.assert_close(sde.reverse_drift(schedule, z_0, z_t, t), -0.5 * z_t - score)
        torch.testing.assert_close(probability_flow(schedule, z_0, z_t, t), -0.5 * (z_t + score))


def test_forward_sde_matches_marginal_of_chain():
    schedule, mean, variance = linear(), 0.7, 0.3
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    mean_errors, variance_errors = [], []
    for steps in STEPS:
        times = [clock_time(schedule, w) for w in clock_nodes(schedule, steps + 1, 1.0)][::-1]
        m, v = [row[0] for row in moments_at(schedule, 1, mean, variance)]
        for s, t in zip(times, times[1:], strict=False):
            m = forward_sde_step(schedule, one, s, t, zero).item() * m
            factor, noise = forward_sde_step(schedule, one, s, t, zero), forward_sde_step(schedule, zero, s, t, one)
            v = factor.item() ** 2 * v + noise.item() ** 2
        expected = moments_at(schedule, 1000, mean, variance)
        mean_errors.append(m - expected[0][0])
        variance_errors.append(v - expected[1][0])
    print_convergence("forward SDE, mean", mean_errors, 1)
    print_convergence("forward SDE, variance", variance_errors, 1)
    assert orders(mean_errors)[-1] == pytest.approx(1, abs=0.1)
    assert orders(variance_errors)[-1] == pytest.approx(1, abs=0.1)
    assert max(abs(mean_errors[-1]), abs(variance_errors[-1])) < 3e-2


def moments_at(schedule, t, mean, variance):
    a = schedule.alpha_bar[t].item()
    return [a**0.5 * mean], [a * variance + 1 - a]


@pytest.mark.parametrize("variance", [0.25, 0.003])
def test_reverse_sde_variance_converges_with_order_1(exact_gaussian, unit_noise, variance):
    schedule = cosine()
    exact = exact_gaussian(schedule, 0.0, variance)
    expected = moments_at(schedule, 1, 0.0, variance)[1][0]
    errors = []
    for steps in STEPS:
        z_T = torch.eye(1, steps + 2, dtype=torch.float64)
        unit_noise(z_T)
        errors.append(latent_at_t_min(SDESampler(steps + 1), exact, z_T).square().sum().item() / expected - 1)
    print_convergence(f"reverse SDE, relative variance, data N(0, {variance})", errors, 1)
    assert abs(errors[-1]) < 5e-3
    assert orders(errors)[-1] == pytest.approx(1, abs=0.3 if variance < 0.01 else 0.1)


def test_reverse_sde_mean_converges_with_order_1(exact_gaussian, monkeypatch):
    monkeypatch.setattr(sde, "draw_noise", lambda like, generator: torch.zeros_like(like))
    schedule = cosine()
    exact = exact_gaussian(schedule, 0.7, 0.25)
    expected = moments_at(schedule, 1, 0.7, 0.25)[0][0]
    start = torch.zeros(1, 1, dtype=torch.float64)
    errors = [latent_at_t_min(SDESampler(steps + 1), exact, start).item() - expected for steps in STEPS]
    print_convergence("reverse SDE, mean", errors, 1)
    assert orders(errors)[-1] == pytest.approx(1, abs=0.1)
    assert abs(errors[-1]) < 2e-3


def test_corrector_reduces_error_of_predictor(exact_gaussian, unit_noise):
    # Compare the largest relative error of the variance over all visited times.
    schedule = cosine()
    exact = exact_gaussian(schedule, 0.0, 0.25)
    largest_errors, final_errors = {}, {}
    for corrector_steps in (0, 1, 4):
        z_T = torch.eye(1, 2 + 80 * (1 + corrector_steps), dtype=torch.float64)
        errors = []

        def record_error(s, z_s, z_0, errors=errors):
            if s > 0:
                a = schedule.at(s, z_s).item()
                errors.append(z_s.square().sum().item() / (a * 0.25 + 1 - a) - 1)

        unit_noise(z_T)
        SDESampler(81, corrector_steps)(exact, z_T, on_step=record_error)
        largest_errors[corrector_steps], final_errors[corrector_steps] = max(map(abs, errors)), errors[-1]
        print(f"\n{corrector_steps} corrections: largest {max(map(abs, errors)):.4f}, at t_min {errors[-1]:+.4f}")
    assert largest_errors[4] < largest_errors[1] < largest_errors[0]
    # Discretisation increases the equilibrium variance of Langevin dynamics by up to a fraction snr^2.
    assert all(abs(error) < 0.16**2 for error in final_errors.values())


def test_langevin_steps_converge_to_the_marginal(exact_gaussian, randn):
    schedule = linear()
    exact, z = exact_gaussian(schedule, 0.7, 0.3), torch.full((20_000, 1), 3.0, dtype=torch.float64)
    a = schedule.alpha_bar[300].item()
    generator = seeded()
    for _ in range(300):
        z = langevin_step(schedule, exact(z, 300).z_0, z, t=300, snr=0.16, generator=generator)
    variance = a * 0.3 + 1 - a
    assert abs(z.mean() - a**0.5 * 0.7) < 4 * (variance / 20_000) ** 0.5
    # Discretisation increases the equilibrium variance by up to a fraction snr^2.
    assert 1 - 0.04 < z.var() / variance < 1 + 0.04 + 0.16**2


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("corrector_steps", [0, 1])
def test_samples_reach_each_mode_with_its_weight(exact_mixture, randn, schedule, corrector_steps):
    means = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.5, 1.5]])
    weights = [0.1, 0.2, 0.3, 0.4]
    exact = exact_mixture(schedule, means, weights, variance=0.01)
    z = SDESampler(100, corrector_steps)(exact, randn(5000, 2, dtype=torch.float32), generator=seeded())
    distance, mode = torch.cdist(z, means).min(1)
    assert distance.max() < 6 * 0.1
    counts = torch.bincount(mode, minlength=4).numpy()
    p_value = scipy.stats.chisquare(counts, 5000 * np.array(weights)).pvalue
    print(f"\n{schedule.name}, {corrector_steps} corrections: {counts / 5000} for {weights}, p = {p_value:.3f}")
    assert p_value > 1e-3


@pytest.mark.parametrize("corrector_steps", [0, 2])
def test_each_sample_depends_only_on_its_generator(exact_mixture, randn, corrector_steps):
    exact = exact_mixture(linear(100), [[-1.0, 0.5, 0.0], [1.5, 0.0, 0.3]], [0.4, 0.6])
    sampler, z_T = SDESampler(30, corrector_steps), randn(16, 3)
    batched = sampler(exact, z_T, generator=[seeded(i) for i in range(16)])
    for batch in (1, 3):
        small_batch = sampler(exact, z_T[:batch], generator=[seeded(i) for i in range(batch)])
        assert small_batch.equal(batched[:batch])
    assert sampler(exact, z_T[[5]], generator=[seeded(5)]).equal(batched[[5]])
    assert not batched.equal(sampler(exact, z_T, generator=[seeded(i + 16) for i in range(16)]))


def test_denoiser_calls_visited_times_and_dtype(exact_gaussian, randn):
    schedule, calls, transitions = linear(100), [], []
    exact = exact_gaussian(schedule, 0.5, 0.2)

    class RecordingDenoiser:
        def __call__(self, z_t, t, condition=None):
            calls.append((t, condition))
            return exact(z_t, t)

    RecordingDenoiser.schedule = schedule
    condition = {"label": torch.tensor([1, 2])}
    z = SDESampler(40, 2)(
        RecordingDenoiser(),
        randn(2, 3).bfloat16(),
        condition,
        generator=seeded(),
        on_step=lambda s, z_s, z_0: transitions.append((s, z_s, z_0)),
    )
    assert len(calls) == 40 + 2 * 39
    assert all(received is condition for _, received in calls)
    times = [s for s, _, _ in transitions]
    assert len(times) == 40
    assert all(s < t for t, s in zip(times, times[1:], strict=False))
    assert times[-2:] == [pytest.approx(1), 0]
    assert z.dtype == torch.float32
    assert transitions[-1][1].equal(z)
    assert SDESampler(40).method == "sde"
    single_step = SDESampler(1)(exact, randn(2, 3))
    assert single_step.shape == (2, 3)


def test_noise_end_is_T_or_where_alpha_bar_is_1e_8():
    start, stop = clock_ends(linear(), 1.0)
    assert clock_time(linear(), start) == pytest.approx(1000)
    assert clock_time(linear(), stop) == pytest.approx(1)
    assert clock_time(linear(), clock_ends(linear(), 2.5)[1]) == pytest.approx(2.5)
    for schedule in (cosine(), rectified_flow()):
        t = clock_time(schedule, clock_ends(schedule, 1.0)[0])
        assert 999 < t < 1000
        assert schedule.at(t, torch.zeros(1)).item() == pytest.approx(1e-8, rel=1e-6)


def test_network_and_guidance_accept_real_times(randn):
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3)

    def network(z_t, timesteps, condition):
        assert timesteps.is_floating_point()
        return layer(torch.cat([z_t, timesteps[:, None] / 100, condition["label"][:, None]], 1))

    denoiser = Denoiser(linear(100), network, "v")
    guided = Guided(denoiser, 2.0, {"label": torch.zeros(1)}, interval=(0.2, 0.8))
    z_T, condition = randn(4, 3, dtype=torch.float32), {"label": torch.ones(4)}
    unguided_z, guided_z = (SDESampler(30)(model, z_T, condition, generator=seeded()) for model in (denoiser, guided))
    assert guided_z.isfinite().all()
    assert not unguided_z.requires_grad
    assert not guided_z.equal(unguided_z)


def test_invalid_options_and_calls_raise(exact_gaussian, randn):
    for options, message in [
        ({"steps": 0}, "steps=0.*1 or more"),
        ({"corrector_steps": -1}, "corrector_steps=-1.*0 or more"),
        ({"corrector_snr": 1.5}, r"corrector_snr=1\.5.*below 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            SDESampler(**{"steps": 50, **options})
    schedule, z = linear(100), randn(3, 1)
    exact = exact_gaussian(schedule, 0.5, 0.2)
    with pytest.raises(ValueError, match=r"2 generators.*batch of 3\b"):
        SDESampler(50)(exact, z, generator=[seeded(), seeded()])
    with pytest.raises(ValueError, match=r"unstable with 5 steps.*'linear'.*at least \d+"):
        SDESampler(5)(exact, z)
    for t_min in (0.5, 100.0):
        with pytest.raises(ValueError, match=rf"t_min.*\[1, T\).*{t_min}"):
            SDESampler(50, t_min=t_min).check(schedule)
    with pytest.raises(ValueError, match=r"t_min = 999\.9.*noise end.*rectified_flow"):
        SDESampler(50, t_min=999.9).check(rectified_flow())
    with pytest.raises(ValueError, match="linear.*one step.*at least two"):
        SDESampler(50).check(linear(1))
    with pytest.raises(ValueError, match="noise_only.*1e-20"):
        SDESampler(50).check(NoiseSchedule("noise_only", torch.tensor([1, 0.5, 1e-30, 1e-40], dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"1 <= s < t <= T = 100\b.*s = 0\.5, t = 3"):
        reverse_sde_step(schedule, z, z, s=0.5, t=3.0)
    with pytest.raises(ValueError, match=r"1 <= s < t <= T = 100\b.*s = 7\.0, t = 7\.0"):
        forward_sde_step(schedule, z, 7.0, 7.0, z)


def test_smallest_allowed_number_of_steps_is_stable(exact_gaussian):
    # The variance of the samples is at most 10 times the variance of the data.
    for schedule in SCHEDULES:
        min_steps = next(steps for steps in range(2, 100) if _is_allowed(steps, schedule))
        z = SDESampler(min_steps)(exact_gaussian(schedule, 0.5, 1e-3), torch.randn(500, 1, generator=seeded()))
        print(
            f"\n{schedule.name}: {min_steps} steps, mean {z.mean():.3f} (data 0.5), variance {z.var():.1e} (data 1e-3)"
        )
        assert abs(z.mean() - 0.5) < 0.05
        assert z.var() < 0.01


def _is_allowed(steps, schedule):
    try:
        SDESampler(steps).check(schedule)
    except ValueError:
        return False
    return True


def test_sde_accepts_denoiser_with_learned_v(randn):
    class LearnedVarianceDenoiser:
        schedule = linear(100)

        def __call__(self, z_t, t, condition=None):
            return Prediction(0.5 * z_t, torch.zeros_like(z_t))

    assert SDESampler(30)(LearnedVarianceDenoiser(), randn(2, 3), generator=seeded()).isfinite().all()
