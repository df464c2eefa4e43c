import math

import numpy as np
import pytest
import torch

from ldm.diffusion.continuous.ode_likelihood import ode_log_likelihood
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Guided
from ldm.diffusion.schedule import cosine, linear, rectified_flow

TIGHT = {"rtol": 1e-6, "atol": 1e-6}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw_with_log_density(exact, t, count):
    """Draw samples z_t from the exact denoiser's data distribution at t, and return them with their log-density."""
    a = exact.schedule.at(t, exact.means)
    modes = torch.multinomial(exact.weights, count, replacement=True, generator=seeded(1))
    noise = torch.randn(count, exact.means.shape[1], dtype=torch.float64, generator=seeded(2))
    z = a.sqrt() * exact.means[modes] + (a * exact.variance + 1 - a).sqrt() * noise
    return z, exact.log_joint(z, t).logsumexp(1)


MIXTURES = {
    "Gaussian, d = 1": ([[0.7]], [1.0], 0.3),
    "mixture, d = 1": ([[-1.0], [1.5]], [0.4, 0.6], 0.05),
    "mixture, d = 2": ([[-1.0, -1.0], [1.0, -1.0], [1.5, 1.5]], [0.2, 0.3, 0.5], 0.05),
    "Gaussian, d = 16": ([[0.5] * 16], [1.0], 0.2),
}


@pytest.mark.parametrize("schedule", [cosine(), rectified_flow()], ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("data", MIXTURES)
@pytest.mark.parametrize("t_min", [1.0, 12.5])
def test_exact_trace_matches_log_density_at_t_min(exact_mixture, schedule, data, t_min):
    exact = exact_mixture(schedule, *MIXTURES[data])
    z, log_density = draw_with_log_density(exact, t_min, 12)
    result = ode_log_likelihood(exact, z, t_min=t_min, probes=None, **TIGHT)
    error = (result.log_likelihood - log_density).abs().max().item()
    print(f"\n{schedule.name}, {data}, t_min = {t_min}: error {error:.1e} in {result.num_evaluations} evaluations")
    assert error < 1e-3
    assert result.log_likelihood.shape == (12,)
    assert result.probe_variance is None


def test_log_likelihood_error_decreases_with_tolerance(exact_mixture):
    exact = exact_mixture(cosine(), *MIXTURES["mixture, d = 2"])
    z, _ = draw_with_log_density(exact, 1.0, 12)
    reference = ode_log_likelihood(exact, z, probes=None, rtol=1e-9, atol=1e-9).log_likelihood
    errors = []
    for tolerance in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        result = ode_log_likelihood(exact, z, probes=None, rtol=tolerance, atol=tolerance)
        errors.append((result.log_likelihood - reference).abs().max().item())
        print(f"\ntolerance {tolerance:.0e}: error {errors[-1]:.1e} in {result.num_evaluations} evaluations", end="")
    assert errors[-1] < 1e-5
    assert errors[1] < 1e-2


def test_prior_is_standard_normal_even_if_chain_ends_with_signal(exact_gaussian):
    # The model's density is N(0, I) transported by the ODE, which differs from the density of the data.
    schedule = linear(1000, beta_start=1e-5, beta_end=2e-3)
    exact, variance = exact_gaussian(schedule, 0.0, 0.3), 0.3
    marginal_variance = {t: (schedule.alpha_bar[t] * variance + 1 - schedule.alpha_bar[t]).item() for t in (1, 1000)}
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    # The flow is linear and maps N(0, marginal_variance[1]) to N(0, marginal_variance[1000]). It therefore maps
    # N(0, marginal_variance[1] / marginal_variance[1000]) to N(0, 1).
    expected = (
        torch.distributions.Normal(0, (marginal_variance[1] / marginal_variance[1000]) ** 0.5).log_prob(z).flatten()
    )
    result = ode_log_likelihood(exact, z, probes=None, **TIGHT)
    torch.testing.assert_close(result.log_likelihood, expected, atol=1e-4, rtol=0)


def test_density_integrates_to_one(exact_mixture):
    exact = exact_mixture(linear(), *MIXTURES["mixture, d = 1"])
    z = torch.linspace(-4, 5, 901, dtype=torch.float64)[:, None]
    density = ode_log_likelihood(exact, z, probes=None, **TIGHT).log_likelihood.exp()
    assert torch.trapezoid(density, z[:, 0]).item() == pytest.approx(1, abs=1e-3)


def test_hutchinson_is_unbiased(exact_mixture):
    exact = exact_mixture(cosine(), *MIXTURES["mixture, d = 2"])
    z, log_density = draw_with_log_density(exact, 1.0, 6)
    result = ode_log_likelihood(exact, z, probes=100, generators=seeded(), **TIGHT)
    error = (result.log_likelihood - log_density).numpy()
    standard_error = (result.probe_variance / 100).sqrt().numpy()
    print(f"\nerrors {error.round(3)} with standard errors {standard_error.round(3)}")
    assert (np.abs(error) < 4 * standard_error + 1e-3).all()
    assert standard_error.max() > 0.01


def test_probes_are_exact_if_jacobian_is_multiple_of_identity(exact_mixture):
    exact = exact_mixture(cosine(), *MIXTURES["Gaussian, d = 16"])
    z, log_density = draw_with_log_density(exact, 1.0, 4)
    result = ode_log_likelihood(exact, z, probes=2, generators=seeded(), **TIGHT)
    torch.testing.assert_close(result.log_likelihood, log_density, atol=1e-3, rtol=0)
    assert result.probe_variance.max() < 1e-12
    assert ode_log_likelihood(exact, z.float()).log_likelihood.dtype == torch.float64


def test_probes_depend_only_on_generator_of_their_sample(exact_mixture):
    exact = exact_mixture(cosine(), *MIXTURES["mixture, d = 2"])
    z, _ = draw_with_log_density(exact, 1.0, 3)
    batched = ode_log_likelihood(exact, z, generators=[seeded(i) for i in range(3)], **TIGHT).log_likelihood
    for i in range(3):
        single = ode_log_likelihood(exact, z[[i]], generators=[seeded(i)], **TIGHT).log_likelihood
        torch.testing.assert_close(single, batched[[i]], atol=1e-3, rtol=0)
    other_seeds = ode_log_likelihood(exact, z, generators=[seeded(i + 3) for i in range(3)], **TIGHT).log_likelihood
    assert (other_seeds - batched).abs().max() > 0.01


def test_frozen_network_is_differentiated_only_with_respect_to_its_input(randn):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 6)).requires_grad_(False)
    times = []

    def network(z_t, timesteps, condition):
        flat = torch.cat([z_t.flatten(1), timesteps[:, None] / 100, condition["label"][:, None]], 1)
        return layers(flat).reshape(z_t.shape)

    guided = Guided(Denoiser(linear(100), network, "v"), 1.5, {"label": torch.zeros(1)})
    z, condition = randn(3, 2, 3, 1, dtype=torch.float32), {"label": torch.ones(3)}
    with torch.no_grad():
        exact = ode_log_likelihood(guided, z, condition, probes=None, on_evaluation=times.append)
        estimate = ode_log_likelihood(guided, z, condition, probes=400, generators=seeded())
    assert len(times) == exact.num_evaluations
    assert times[0] == pytest.approx(1)
    assert max(times) == pytest.approx(100)
    assert not exact.log_likelihood.requires_grad
    assert not z.requires_grad
    standard_error = (estimate.probe_variance / 400).sqrt()
    assert ((estimate.log_likelihood - exact.log_likelihood).abs() < 4 * standard_error + 1e-3).all()


def test_invalid_calls_raise(exact_gaussian, randn):
    exact, z = exact_gaussian(linear(100), 0.5, 0.2), randn(3, 1)
    with pytest.raises(ValueError, match=r"probes.*at least 1\b.*None.*\b0\b"):
        ode_log_likelihood(exact, z, probes=0)
    with pytest.raises(ValueError, match=r"1 generators.*batch of 3\b"):
        ode_log_likelihood(exact, z, generators=[seeded()])
    with pytest.raises(ValueError, match=r"t_min.*\[1, T\).*0\.5"):
        ode_log_likelihood(exact, z, t_min=0.5)
    with pytest.raises(ValueError, match="at least 1e-12.*rtol = nan"):
        ode_log_likelihood(exact, z, rtol=math.nan)
