import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from ldm.diffusion.continuous.clock import clock_ends, clock_time
from ldm.diffusion.continuous.ode import ODESampler, integrate
from ldm.diffusion.continuous.sde import probability_flow
from ldm.diffusion.denoiser import Denoiser, Prediction
from ldm.diffusion.guidance import Guided
from ldm.diffusion.schedule import NoiseSchedule, cosine, linear, rectified_flow

SCHEDULES = [linear(), cosine(), rectified_flow()]
STEPS = [10, 20, 40, 80]
MEANS, WEIGHTS, VARIANCE = np.array([-1.0, 1.5]), np.array([0.4, 0.6]), 0.25


def alpha_bar(u):
    return np.exp(-(0.1 * u + 9.95 * u**2))


def flow(u, z):
    """Return dz/du = -1/2 b(u) (z + score) in closed form, with b(u) = 0.1 + 19.9 u."""
    a = alpha_bar(u)
    marginal_variance = a * VARIANCE + 1 - a
    offset = z[:, None] - math.sqrt(a) * MEANS
    weights = WEIGHTS * np.exp(-(offset**2) / (2 * marginal_variance))
    score = -(weights * offset).sum(1) / weights.sum(1) / marginal_variance
    return -0.5 * (0.1 + 19.9 * u) * (z + score)


@pytest.fixture
def mixture(exact_mixture):
    def build(schedule):
        return exact_mixture(schedule, MEANS[:, None], WEIGHTS, VARIANCE)

    return build


def orders(errors):
    return [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]


def print_convergence(quantity, errors, theory):
    columns = " ".join(f"{error:.2e}" for error in errors), " ".join(f"{order:.2f}" for order in orders(errors))
    print(f"\n{quantity}, {STEPS} steps: errors {columns[0]}, orders {columns[1]} (theory {theory})")


def error_against_reference(mixture, sampler, num_steps=1000):
    """Return the largest error at t_min, compared with an independent high-order integration in u."""
    schedule = NoiseSchedule("vp", torch.from_numpy(alpha_bar(np.arange(num_steps + 1) / num_steps)))
    z_T = np.linspace(-2, 2, 9)
    reference = scipy.integrate.solve_ivp(flow, (1, 1 / num_steps), z_T, method="DOP853", rtol=1e-12, atol=1e-13)
    z = sampler.decode(mixture(schedule), torch.from_numpy(z_T)[:, None]).flatten().numpy()
    return np.abs(z - reference.y[:, -1]).max()


def test_heun_converges_with_order_2(mixture):
    errors = [error_against_reference(mixture, ODESampler("heun", steps + 1)) for steps in STEPS]
    print_convergence("heun", errors, 2)
    assert orders(errors)[-1] == pytest.approx(2, abs=0.1)
    assert errors[-1] < 3e-4


def test_adaptive_error_decreases_with_tolerance(mixture):
    tolerances = [1e-3, 1e-5, 1e-7, 1e-9]
    errors = [error_against_reference(mixture, ODESampler("adaptive", rtol=t, atol=t)) for t in tolerances]
    print(f"\nadaptive, tolerances {tolerances}: errors {' '.join(f'{error:.1e}' for error in errors)}")
    assert all(error < 50 * tolerance for error, tolerance in zip(errors, tolerances, strict=True))


def test_clock_gives_same_solution_as_time_t(mixture):
    # dz/dt is the flow per elapsed b dt times rate(t), which is b(t) for the interpolated schedule.
    exact = mixture(linear(20, beta_start=0.01, beta_end=0.5))

    def derivative(t, z):
        z_t = torch.from_numpy(z)[:, None]
        slope = exact.schedule.rate(t) * probability_flow(exact.schedule, exact(z_t, t).z_0, z_t, t)
        return slope.flatten().numpy()

    z = np.linspace(-2, 2, 5)
    # Integrate from knot to knot, because the derivative of b jumps at each knot.
    for t in range(20, 1, -1):
        z = scipy.integrate.solve_ivp(derivative, (t, t - 1), z, rtol=1e-10, atol=1e-10).y[:, -1]
    decoded = ODESampler("adaptive", rtol=1e-9, atol=1e-9).decode(exact, torch.linspace(-2, 2, 5).double()[:, None])
    np.testing.assert_allclose(decoded.flatten().numpy(), z, atol=1e-6)


def test_decode_inverts_encode(mixture, randn):
    for schedule in SCHEDULES:
        exact = mixture(schedule)
        z_1 = exact.schedule.alpha_bar[1].sqrt() * randn(8, 1)
        adaptive = ODESampler("adaptive", rtol=1e-8, atol=1e-8)
        error = (adaptive.decode(exact, adaptive.encode(exact, z_1)) - z_1).abs().max().item()
        print(f"\n{schedule.name}: adaptive, encode and decode: error {error:.1e}")
        assert error < 1e-6
        errors = []
        for steps in STEPS:
            heun = ODESampler("heun", steps + 1)
            errors.append((heun.decode(exact, heun.encode(exact, z_1)) - z_1).abs().max().item())
        print_convergence(f"{schedule.name}: heun, encode and decode", errors, "2 or more")
        assert orders(errors)[-1] > 1.8
        assert errors[-1] < 1e-3


def test_encoded_data_is_standard_normal(mixture):
    exact, count = mixture(cosine()), 4000
    modes = torch.multinomial(exact.weights, count, replacement=True, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a = exact.schedule.alpha_bar[1]
    z_1 = a.sqrt() * exact.means[modes] + (a * VARIANCE + 1 - a).sqrt() * noise
    encoded = ODESampler("adaptive").encode(exact, z_1)
    assert scipy.stats.kstest(encoded.flatten().numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("solver", ["heun", "adaptive"])
def test_samples_reach_each_mode_with_its_weight(exact_mixture, randn, schedule, solver):
    means = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.5, 1.5]])
    weights = [0.1, 0.2, 0.3, 0.4]
    exact = exact_mixture(schedule, means, weights, variance=0.01)
    z = ODESampler(solver, 50)(exact, randn(5000, 2, dtype=torch.float32))
    distance, mode = torch.cdist(z, means).min(1)
    assert distance.max() < 6 * 0.1
    counts = torch.bincount(mode, minlength=4).numpy()
    p_value = scipy.stats.chisquare(counts, 5000 * np.array(weights)).pvalue
    print(f"\n{schedule.name}, {solver}: {counts / 5000} for {weights}, p = {p_value:.3f}")
    assert p_value > 1e-3


@pytest.mark.parametrize(("solver", "steps", "calls"), [("heun", 7, 13), ("heun", 1, 1), ("adaptive", 7, None)])
def test_denoiser_calls_visited_times_and_dtype(mixture, randn, solver, steps, calls):
    exact, transitions, times = mixture(linear(100)), [], []

    class RecordingDenoiser:
        schedule = exact.schedule

        def __call__(self, z_t, t, condition=None):
            times.append(t)
            assert condition is expected_condition
            return exact(z_t, t)

    expected_condition, generator = {"label": torch.tensor([1, 2])}, torch.Generator().manual_seed(0)
    initial_state = generator.get_state()
    z = ODESampler(solver, steps)(
        RecordingDenoiser(),
        randn(2, 1).bfloat16(),
        expected_condition,
        generator=generator,
        on_step=lambda s, z_s, z_0: transitions.append((s, z_s, z_0)),
    )
    assert generator.get_state().equal(initial_state)
    assert z.dtype == torch.float32
    visited = [s for s, _, _ in transitions]
    assert all(s < t for t, s in zip(visited, visited[1:], strict=False))
    assert visited[-1] == 0
    assert transitions[-1][1].equal(z)
    assert all(z_s.shape == z_0.shape == (2, 1) for _, z_s, z_0 in transitions)
    assert times[0] == pytest.approx(100)
    if steps > 1:
        assert visited[-2] == pytest.approx(1)
    if calls is not None:
        assert len(times) == calls
        assert len(visited) == steps
    if solver == "adaptive":
        # The adaptive solver passes the z_0 that was predicted at the accepted step.
        torch.testing.assert_close(transitions[0][2], exact(transitions[0][1], visited[0]).z_0)
    assert ODESampler().method == "ode"


def test_heun_does_not_depend_on_batch_size(mixture, randn):
    exact, z_T, sampler = mixture(linear(100)), randn(16, 1), ODESampler("heun", 10)
    expected = sampler(exact, z_T)
    for batch in (1, 3):
        assert sampler(exact, z_T[:batch]).equal(expected[:batch])


def test_network_and_guidance_accept_real_times(randn):
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3)

    def network(z_t, timesteps, condition):
        assert timesteps.is_floating_point()
        return layer(torch.cat([z_t, timesteps[:, None] / 100, condition["label"][:, None]], 1))

    denoiser = Denoiser(linear(100), network, "eps")
    guided = Guided(denoiser, 2.0, {"label": torch.zeros(1)})
    z_T, condition = randn(4, 3, dtype=torch.float32), {"label": torch.ones(4)}
    for solver in ("heun", "adaptive"):
        sampler = ODESampler(solver, 100, rtol=1e-5, atol=1e-5)
        unguided_z, guided_z = (sampler(model, z_T, condition) for model in (denoiser, guided))
        assert not unguided_z.requires_grad
        assert not guided_z.equal(unguided_z)
        decoded = sampler.decode(guided, sampler.encode(guided, z_T, condition), condition)
        torch.testing.assert_close(decoded, z_T, atol=2e-2, rtol=0)


def test_ode_stops_at_t_min(mixture, randn):
    exact, times = mixture(linear(100)), []

    class RecordingDenoiser:
        schedule = exact.schedule

        def __call__(self, z_t, t, condition=None):
            times.append(t)
            return exact(z_t, t)

    ODESampler("heun", 5, t_min=3.5)(RecordingDenoiser(), randn(2, 1))
    assert min(times) == pytest.approx(3.5)
    assert clock_time(exact.schedule, clock_ends(exact.schedule, 3.5)[1]) == pytest.approx(3.5)


def test_invalid_options_and_calls_raise(mixture, randn):
    for options, message in [
        ({"solver": "euler"}, "ODE solver.*'euler'.*heun, adaptive"),
        ({"steps": 0}, "steps=0.*1 or more"),
        ({"rtol": 0.0}, r"at least 1e-12.*rtol = 0\.0"),
        ({"atol": math.nan}, "at least 1e-12.*atol = nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            ODESampler(**options)
    exact, z = mixture(linear(100)), randn(2, 1)
    for method in (ODESampler("heun", 1).encode, ODESampler("heun", 1).decode):
        with pytest.raises(ValueError, match=r"at least 2 steps.*heun.*\b1\b"):
            method(exact, z)
    with pytest.raises(ValueError, match=r"t_min.*\[1, T\).*0\.1"):
        ODESampler(t_min=0.1).check(linear(100))
    with pytest.raises(ValueError, match="linear.*one step.*at least two"):
        ODESampler()(mixture(linear(1)), z)

    class BrokenDenoiser:
        schedule = linear(100)

        def __call__(self, z_t, t, condition=None):
            return Prediction(z_t * math.nan, None)

    with pytest.raises(ArithmeticError, match="not finite at w = .*network"):
        ODESampler("adaptive")(BrokenDenoiser(), z)
    with pytest.raises(ArithmeticError, match="failed at w = 1"):
        integrate(lambda w, state: state**2, np.ones(1), 0.0, 2.0, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="at least 1e-12"):
        integrate(lambda w, state: -state, np.ones(1), 0.0, 1.0, rtol=1e-14, atol=1.0)
