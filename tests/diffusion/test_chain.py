import math

import pytest
import scipy.optimize
import scipy.stats
import torch
from diffusers import DDPMScheduler

from ldm.diffusion import chain
from ldm.diffusion.schedule import cosine, linear, rectified_flow, scaled_linear

SCHEDULES = [linear(100, 1e-3, 0.2), scaled_linear(100), cosine(100), rectified_flow(100)]
PREDICTIONS = ["eps", "z_0", "v", "flow"]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)


@each_schedule
@pytest.mark.parametrize(("s", "t"), [(1, 2), (49, 50), (10, 90), (99, 100), (1, 100)])
def test_posterior_matches_conditioned_joint_gaussian(schedule, s, t, randn):
    z_0, z_t = randn(5, 3), randn(5, 3)
    a_s, a_t = schedule.alpha_bar[s], schedule.alpha_bar[t]
    # Given z_0, z_s and z_t are jointly Gaussian. Condition this distribution on z_t using its covariance.
    gain = (a_t / a_s).sqrt() * (1 - a_s) / (1 - a_t)
    expected_mean = a_s.sqrt() * z_0 + gain * (z_t - a_t.sqrt() * z_0)
    expected_variance = (1 - a_s) - gain**2 * (1 - a_t)
    mean, variance = chain.posterior(schedule, z_0, z_t, s, t)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(variance.squeeze(), expected_variance, rtol=1e-7, atol=1e-12)


@each_schedule
def test_posterior_at_s_0_is_z_0(schedule, randn):
    z_0 = randn(2, 3)
    mean, variance = chain.posterior(schedule, z_0, randn(2, 3), 0, 7)
    torch.testing.assert_close(mean, z_0)
    assert variance.item() == 0


@each_schedule
@pytest.mark.parametrize("stride", [1, 10])
def test_composed_forward_steps_match_marginal_moments(schedule, stride):
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    mean, variance = one, zero
    for s in range(0, 100, stride):
        t = s + stride
        mean = chain.forward_step(schedule, mean, s, t, zero)
        scaled_variance = chain.forward_step(schedule, variance.sqrt(), s, t, zero) ** 2
        variance = scaled_variance + chain.forward_step(schedule, zero, s, t, one) ** 2
        torch.testing.assert_close(mean, chain.marginal(schedule, one, t, zero))
        torch.testing.assert_close(variance.sqrt(), chain.marginal(schedule, zero, t, one))


def test_composed_forward_steps_match_marginal_distribution(randn):
    schedule = linear(40, 1e-3, 0.1)
    z = torch.full((20_000, 1), 2.0, dtype=torch.float64)
    for s in range(40):
        z = chain.forward_step(schedule, z, s, s + 1, randn(20_000, 1))
    a = schedule.alpha_bar[40].item()
    assert scipy.stats.kstest(z.flatten(), scipy.stats.norm(2 * a**0.5, (1 - a) ** 0.5).cdf).pvalue > 1e-3


def test_marginal_equals_diffusers_add_noise(randn):
    schedule = scaled_linear()
    scheduler = DDPMScheduler(trained_betas=schedule.betas.tolist())
    z_0, eps = randn(4, 3, 2, 2, dtype=torch.float32), randn(4, 3, 2, 2, dtype=torch.float32)
    t = torch.tensor([1, 2, 500, 1000])
    expected = scheduler.add_noise(z_0, eps, t - 1)
    torch.testing.assert_close(chain.marginal(schedule, z_0, t, eps), expected, rtol=1e-4, atol=2e-5)


@each_schedule
@pytest.mark.parametrize(("s", "t"), [(1, 2), (10, 90), (99, 100)])
def test_log_variance_matches_formulas(schedule, s, t, randn):
    a_s, a_t = schedule.alpha_bar[s], schedule.alpha_bar[t]
    b = 1 - a_t / a_s
    bt = b * (1 - a_s) / (1 - a_t)
    z, v = randn(3, 2), randn(3, 2).sigmoid()
    fixed_large = chain.log_variance(schedule, s, t, "fixed_large", like=z)
    fixed_small = chain.log_variance(schedule, s, t, "fixed_small", like=z)
    learned_range = chain.log_variance(schedule, s, t, "learned_range", like=z, v=v)
    torch.testing.assert_close(fixed_large.squeeze(), b.log())
    torch.testing.assert_close(fixed_small.squeeze(), bt.log())
    torch.testing.assert_close(learned_range, v * b.log() + (1 - v) * bt.log())


def test_last_step_uses_posterior_variance_of_step_2_to_1(randn):
    schedule, z = linear(100), randn(3, 2)
    v = torch.tensor([[0.0, 1.0]] * 3, dtype=torch.float64)
    for t in (1, 50):
        b_1 = chain.log_variance(schedule, 0, t, "fixed_large", like=z)
        bt_2 = chain.log_variance(schedule, 1, 2, "fixed_small", like=z)
        torch.testing.assert_close(b_1.exp().squeeze(), 1 - schedule.alpha_bar[t])
        assert chain.log_variance(schedule, 0, t, "fixed_small", like=z).equal(bt_2)
        learned_range = chain.log_variance(schedule, 0, t, "learned_range", like=z, v=v)
        torch.testing.assert_close(learned_range, torch.cat([bt_2, b_1], 1).expand(3, 2))
    s, t = torch.tensor([0, 0, 9]), torch.tensor([1, 50, 10])
    batch = chain.log_variance(schedule, s, t, "fixed_small", like=z)
    torch.testing.assert_close(batch[2], chain.log_variance(schedule, 9, 10, "fixed_small", like=z)[0])
    torch.testing.assert_close(batch[:2], bt_2.expand(2, 1))
    with pytest.raises(ValueError, match=r"one step.*fixed_large"):
        chain.log_variance(linear(1), 0, 1, "fixed_small", like=z)


@each_schedule
@pytest.mark.parametrize(("s", "t"), [(0, 1), (0, 40), (1, 2), (10, 90), (99, 100)])
@pytest.mark.parametrize("c", [0.1, 1.0, 4.0])
def test_optimal_log_variance_matches_reverse_variance_of_gaussian_data(schedule, s, t, c, randn):
    a = schedule.alpha_bar
    table = c * (1 - a) / (a * c + 1 - a)
    # Var(z_s | z_t) from the joint Gaussian of z_s and z_t for data N(0, c), computed without a denoiser.
    marginal = a[[s, t]] * c + 1 - a[[s, t]]
    expected = marginal[0] - (a[t] / a[s]) * marginal[0] ** 2 / marginal[1]
    log_sigma = chain.log_variance(schedule, s, t, "optimal", like=randn(3, 2), z_0_mse=table)
    torch.testing.assert_close(log_sigma.exp().squeeze(), expected, rtol=1e-7, atol=1e-12)
    steps = torch.tensor([s, 0, 5]), torch.tensor([t, 3, 7])
    batch = chain.log_variance(schedule, *steps, "optimal", like=randn(3, 2), z_0_mse=table)
    assert batch.shape == (3, 1)
    torch.testing.assert_close(batch[0], log_sigma[0])


@each_schedule
@pytest.mark.parametrize(("s", "t"), [(0, 1), (0, 40), (3, 4), (10, 90)])
def test_optimal_log_variance_minimises_kl_for_inexact_denoiser(schedule, s, t, randn):
    # Average the KL divergence between torch distributions over 2000 latents with inexact predictions.
    z_0 = randn(2000, 3)
    predicted, z_t = 0.7 * z_0 + 0.4 * randn(2000, 3), randn(2000, 3)
    table = torch.zeros(101, dtype=torch.float64)
    table[1:] = (z_0 - predicted).square().mean()
    q_mean, bt = chain.posterior(schedule, z_0, z_t, s, t)
    p_mean, _ = chain.posterior(schedule, predicted, z_t, s, t)

    def divergence(log_sigma):
        p = torch.distributions.Normal(p_mean, math.exp(0.5 * log_sigma))
        if s == 0:
            return -p.log_prob(z_0).mean().item()
        return torch.distributions.kl_divergence(torch.distributions.Normal(q_mean, bt.sqrt()), p).mean().item()

    log_sigma = chain.log_variance(schedule, s, t, "optimal", like=z_0, z_0_mse=table).item()
    optimum = scipy.optimize.minimize_scalar(
        divergence, (log_sigma - 1.1, log_sigma + 0.9), method="brent", options={"xtol": 1e-8}
    )
    assert optimum.x == pytest.approx(log_sigma, abs=1e-5)


def test_optimal_variance_rejects_invalid_mse_table(randn):
    schedule, z = linear(10), randn(2, 3)
    table = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert chain.check_z_0_mse(schedule, table) is None
    with pytest.raises(ValueError, match=r"optimal.*z_0_mse.*training split"):
        chain.log_variance(schedule, 2, 3, "optimal", like=z)
    with pytest.raises(ValueError, match=r"T \+ 1 = 11\b.*10\b.*training split"):
        chain.log_variance(schedule, 2, 3, "optimal", like=z, z_0_mse=table[:-1])
    for t, value in ((0, 0.1), (4, 0.0), (10, -1.0), (1, math.nan), (3, math.inf)):
        invalid = table.clone()
        invalid[t] = value
        with pytest.raises(ValueError, match=rf"z_0_mse\[{t}\] = {value}\b.*(?i:training split)"):
            chain.log_variance(schedule, 2, 3, "optimal", like=z, z_0_mse=invalid)


@each_schedule
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_type_recovers_z_0(schedule, prediction, randn):
    z_0, eps = randn(4, 3, 2, 2), randn(4, 3, 2, 2)
    last = 99 if prediction == "eps" else 100
    t = torch.tensor([1, 30, 70, last])
    z_t = chain.marginal(schedule, z_0, t, eps)
    output = chain.target(schedule, z_0, eps, t, prediction)
    recovered = chain.to_z_0(schedule, output, z_t, t, prediction)
    torch.testing.assert_close(recovered, z_0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(chain.to_eps(schedule, recovered, z_t, t), eps, rtol=1e-8, atol=1e-8)
    for i in range(4):
        z_0_i = chain.to_z_0(schedule, output[i : i + 1], z_t[i : i + 1], int(t[i]), prediction)
        torch.testing.assert_close(z_0_i, recovered[i : i + 1])


@each_schedule
def test_score_matches_log_density_gradient(schedule, exact_mixture, randn):
    exact = exact_mixture(schedule, [[-1.0, 0.5], [2.0, 0.0]], (0.3, 0.7), 0.2)
    t = torch.tensor([1, 20, 60, 100])
    z_t = randn(4, 2).requires_grad_()
    log_density = exact.log_joint(z_t, t).logsumexp(-1)
    (gradient,) = torch.autograd.grad(log_density.sum(), z_t)
    torch.testing.assert_close(chain.score(schedule, exact(z_t, t).z_0, z_t, t), gradient, rtol=1e-8, atol=1e-8)


def test_half_precision_becomes_float32_and_float64_is_unchanged(randn):
    schedule = linear(10)
    for dtype, expected in [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64,) * 2,
    ]:
        z, eps = randn(2, 3).to(dtype), randn(2, 3).to(dtype)
        results = [
            chain.marginal(schedule, z, 3, eps),
            chain.forward_step(schedule, z, 2, 3, eps),
            *chain.posterior(schedule, z, eps, 2, 3),
            chain.log_variance(schedule, 2, 3, "fixed_small", like=z),
            chain.to_eps(schedule, z, eps, 3),
            chain.score(schedule, z, eps, 3),
            *(chain.target(schedule, z, eps, 3, prediction) for prediction in PREDICTIONS),
            *(chain.to_z_0(schedule, z, eps, 3, prediction) for prediction in PREDICTIONS),
        ]
        assert {result.dtype for result in results} == {expected}


@pytest.mark.parametrize(("s", "t"), [(3, 3), (4, 3), (-1, 3), (3, 11)])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_steps_out_of_order_are_rejected(s, t, as_tensor, randn):
    z = randn(2, 3)
    if as_tensor:
        s, t = torch.tensor([0, s]), torch.tensor([1, t])
    for function in (chain.forward_step, chain.posterior):
        arguments = (z, s, t, z) if function is chain.forward_step else (z, z, s, t)
        with pytest.raises(ValueError, match=r"0 <= s < t <= T = 10; got s = "):
            function(linear(10), *arguments)
    with pytest.raises(ValueError, match="got s = "):
        chain.log_variance(linear(10), s, t, "fixed_large", like=z)


def test_unknown_options_list_valid_values(randn):
    z = randn(2, 3)
    with pytest.raises(ValueError, match="prediction.*'x_0'.*eps, z_0, v, flow"):
        chain.target(linear(10), z, z, 3, "x_0")
    with pytest.raises(ValueError, match="prediction.*'noise'.*eps"):
        chain.to_z_0(linear(10), z, z, 3, "noise")
    with pytest.raises(ValueError, match="variance.*'learned'.*fixed_small, fixed_large, learned_range, optimal"):
        chain.log_variance(linear(10), 2, 3, "learned", like=z)
    with pytest.raises(ValueError, match=r"learned_range.*\bv\b"):
        chain.log_variance(linear(10), 2, 3, "learned_range", like=z)


def test_eps_prediction_is_rejected_where_alpha_bar_is_zero(randn):
    z, t = randn(2, 3), torch.tensor([3, 10])
    with pytest.raises(ValueError, match="alpha_bar = 0"):
        chain.to_z_0(rectified_flow(10), z, z, t, "eps")
    with pytest.raises(ValueError, match="alpha_bar = 0"):
        chain.target(rectified_flow(10), z, z, t, "eps")
    with pytest.raises(ValueError, match="s = 0, t = 0"):
        chain.to_eps(linear(10), z, z, 0)
