import math

import numpy as np
import pytest
import scipy.stats
import torch

from ldm.diffusion import chain
from ldm.diffusion.bound_terms import bound_term
from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.loss import (
    ImportanceTimesteps,
    hybrid_loss,
    sample_timesteps,
    simple_loss,
    vlb_loss,
    weight,
)
from ldm.diffusion.schedule import cosine, linear, rectified_flow

PREDICTIONS = ["eps", "z_0", "v", "flow"]


def test_uniform_timesteps_are_exactly_uniform():
    t = sample_timesteps(50, 100_000, generator=torch.Generator().manual_seed(0))
    assert (t.min(), t.max()) == (1, 50)
    assert scipy.stats.chisquare(torch.bincount(t)[1:]).pvalue > 1e-3


def test_logit_normal_timesteps_follow_their_density():
    t = sample_timesteps(40, 100_000, "logit_normal", torch.Generator().manual_seed(0))
    assert t.min() >= 1
    assert t.max() <= 40
    u = np.arange(41) / 40
    with np.errstate(divide="ignore"):
        probability = np.diff(scipy.stats.norm.cdf(np.log(u) - np.log1p(-u)))
    # For the chi-square test, merge the outermost bins, whose expected counts are below 5.
    counts = torch.bincount(t, minlength=41)[1:].numpy()
    is_rare = probability * 100_000 < 5
    counts = np.append(counts[~is_rare], counts[is_rare].sum())
    expected = np.append(probability[~is_rare], probability[is_rare].sum()) * 100_000
    is_possible = expected > 0
    assert scipy.stats.chisquare(counts[is_possible], expected[is_possible]).pvalue > 1e-3


def test_timesteps_are_reproducible():
    for distribution in ("uniform", "logit_normal"):
        t, repeated_t = (sample_timesteps(1000, 16, distribution, torch.Generator().manual_seed(7)) for _ in range(2))
        assert t.dtype == torch.long
        assert t.equal(repeated_t)


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(cosine(100), prediction) for prediction in PREDICTIONS]
    + [(rectified_flow(100), prediction) for prediction in PREDICTIONS[1:]],
)
def test_min_snr_weight_on_z_0_is_the_same_in_every_space(schedule, prediction, randn):
    t = torch.tensor([1, 20, 50, 80, 99])
    z_0, eps, predicted = randn(5, 3, 2), randn(5, 3, 2), randn(5, 3, 2)
    z_t = chain.marginal(schedule, z_0, t, eps)
    output = chain.target(schedule, predicted, chain.to_eps(schedule, predicted, z_t, t), t, prediction)
    loss = simple_loss(schedule, output, z_0, eps, t, prediction, weighting="min_snr", gamma=2.0)
    a = schedule.alpha_bar[t]
    expected = (a / (1 - a)).clamp(max=2.0) * (predicted - z_0).square().mean((1, 2))
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_simple_loss_is_unweighted_squared_error(prediction, randn):
    schedule, t = linear(100), torch.tensor([1, 100])
    z_0, eps, output = (randn(2, 3, 4, dtype=torch.float32) for _ in range(3))
    loss = simple_loss(schedule, output.bfloat16(), z_0, eps, t, prediction)
    error = output.bfloat16().float() - chain.target(schedule, z_0, eps, t, prediction)
    torch.testing.assert_close(loss, error.square().mean((1, 2)))
    assert loss.dtype == torch.float32


def test_weights_match_reference_values():
    schedule, t = rectified_flow(4), torch.tensor([1, 2, 3, 4])
    torch.testing.assert_close(
        weight(schedule, t, "min_snr", "v", gamma=5.0),
        torch.tensor([5 / 10, 1 / 2, (1 / 9) / (10 / 9), 0.0], dtype=torch.float64),
    )
    torch.testing.assert_close(
        weight(schedule, t, "min_snr", "flow", gamma=5.0),
        torch.tensor([5 / 16, 1 / 4, (1 / 9) / (4 / 3) ** 2, 0.0], dtype=torch.float64),
    )
    assert weight(schedule, t, "simple", "flow").tolist() == [1, 1, 1, 1]


def test_invalid_arguments_raise():
    t = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="timestep distribution.*'cosine'.*uniform, logit_normal"):
        sample_timesteps(10, 2, "cosine")
    with pytest.raises(ValueError, match="weighting.*'snr'.*simple, min_snr"):
        weight(linear(10), t, "snr", "eps")
    with pytest.raises(ValueError, match="prediction.*'epsilon'.*eps"):
        weight(linear(10), t, "simple", "epsilon")
    with pytest.raises(ValueError, match="alpha_bar = 0"):
        weight(rectified_flow(10), t, "min_snr", "eps")
    with pytest.raises(ValueError, match=r"gamma.*positive.*0\.0"):
        weight(linear(10), t, "min_snr", "eps", gamma=0.0)
    with pytest.raises(ValueError, match="0 <= s < t"):
        weight(linear(10), torch.tensor([0, 1]), "simple", "eps")


def draw_noised(schedule, t, randn, dtype=torch.float64):
    z_0, eps = (randn(len(t), 2, 3, dtype=dtype) for _ in range(2))
    return z_0, eps, chain.marginal(schedule, z_0, t, eps)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_vlb_term_of_hybrid_loss_only_trains_sigma(prediction, randn):
    schedule, t = linear(20, 1e-3, 0.3), torch.tensor([1, 2, 10, 20])
    z_0, eps, z_t = draw_noised(schedule, t, randn)
    output = randn(4, 2, 3).requires_grad_()
    v = randn(4, 2, 3).sigmoid().requires_grad_()
    loss = hybrid_loss(schedule, output, v, z_0, z_t, eps, t, prediction)
    simple = simple_loss(schedule, output, z_0, eps, t, prediction)
    mean = Prediction(chain.to_z_0(schedule, output, z_t, t, prediction), v)
    vlb = vlb_loss(schedule, mean, z_0, t, "learned_range")
    torch.testing.assert_close(loss, simple + 0.001 * vlb)
    output_grad, v_grad = torch.autograd.grad(loss.sum(), (output, v))
    torch.testing.assert_close(output_grad, torch.autograd.grad(simple.sum(), output, retain_graph=True)[0])
    vlb_output_grad, vlb_v_grad = torch.autograd.grad(vlb.sum(), (output, v))
    torch.testing.assert_close(v_grad, 0.001 * vlb_v_grad)
    assert (v_grad != 0).all()
    assert vlb_output_grad.isfinite().all() and (vlb_output_grad != 0).all()


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_vlb_loss_is_unbiased_estimate_of_sum_over_t(variance, randn):
    schedule, t = linear(16, 1e-3, 0.3), torch.arange(1, 17)
    z_0 = randn(16, 2, 3)
    prediction = Prediction(randn(16, 2, 3), randn(16, 2, 3).sigmoid())
    nats = bound_term(schedule, prediction, z_0, t - 1, t, variance=variance)
    loss = vlb_loss(schedule, prediction, z_0, t, variance)
    torch.testing.assert_close(loss.mean(), nats.sum() / (6 * math.log(2)))
    t = sample_timesteps(16, 20_000, generator=torch.Generator().manual_seed(0))
    estimates = loss[t - 1]
    assert abs(estimates.mean() - loss.mean()) < 4 * estimates.std() / 20_000**0.5


def test_half_precision_outputs_have_finite_gradients(randn):
    schedule, t = linear(1000), torch.tensor([1, 2, 500, 1000])
    z_0, eps, z_t = draw_noised(schedule, t, randn, torch.float32)
    output = randn(4, 2, 3).bfloat16().requires_grad_()
    v = randn(4, 2, 3).sigmoid().bfloat16().requires_grad_()
    loss = hybrid_loss(schedule, output, v, z_0, z_t, eps, t, "v")
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert output.grad.isfinite().all() and v.grad.isfinite().all()


def importance_with_full_history(losses):
    """Return an importance sampler of t whose history contains each loss ten times."""
    importance = ImportanceTimesteps(len(losses))
    for _ in range(10):
        importance.update(torch.arange(1, len(losses) + 1), losses)
    return importance


def test_importance_sampling_is_proportional_to_loss_and_unbiased():
    losses = torch.tensor([-40.0, 8.0, 3.0, 1.0, 0.1, 0.0])
    importance = importance_with_full_history(losses)
    expected = 0.999 * losses.abs() / losses.abs().sum() + 0.001 / 6
    torch.testing.assert_close(importance.probabilities(), expected)
    t, weights = importance.sample(200_000, torch.Generator().manual_seed(0))
    counts = torch.bincount(t, minlength=7)[1:].numpy()
    probability = expected.double().numpy()
    assert scipy.stats.chisquare(counts, probability / probability.sum() * 200_000).pvalue > 1e-3
    torch.testing.assert_close(weights, 1 / (6 * expected[t - 1]))
    # E[w L] = sum_t p_t L_t / (T p_t) is the mean over all t. Check this exactly, and over the draws.
    torch.testing.assert_close((expected * losses / (6 * expected)).sum(), losses.mean())
    estimates = weights * losses[t - 1]
    assert abs(estimates.mean() - losses.mean()) < 4 * estimates.std() / 200_000**0.5
    # Importance sampling only considers magnitudes, so it reduces the variance most if all losses have the same sign.
    uniform_losses = losses[torch.randint(6, (200_000,), generator=torch.Generator().manual_seed(1))]
    assert (weights * losses.abs()[t - 1]).std() < 0.2 * uniform_losses.abs().std()


def test_importance_sampling_is_uniform_until_every_t_has_ten_losses():
    importance = ImportanceTimesteps(3)
    for k in range(10):
        t, weights = importance.sample(5, torch.Generator().manual_seed(k))
        torch.testing.assert_close(weights, torch.ones(5))
        importance.update(torch.tensor([1, 2, 3]), torch.tensor([5.0, 1.0, 1.0]))
    assert importance.probabilities()[0] > 0.7
    partial_history = ImportanceTimesteps(3)
    partial_history.update(torch.tensor([1, 2] * 20), torch.ones(40))
    torch.testing.assert_close(partial_history.probabilities(), torch.full((3,), 1 / 3))


def test_importance_history_contains_last_ten_losses_for_any_batch_size():
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(1, 5, (300,), generator=generator)
    losses = torch.arange(300.0)
    last_losses = [sorted(losses[t == k][-10:].tolist()) for k in range(1, 5)]
    for batch in (1, 7, 100, 300):
        importance = ImportanceTimesteps(4)
        for start in range(0, 300, batch):
            importance.update(t[start : start + batch], losses[start : start + batch])
        assert importance.history.sort(dim=1).values.tolist() == last_losses
        assert importance.counts.tolist() == torch.bincount(t)[1:].tolist()


def test_importance_sampling_resumes_from_state_dict():
    original = importance_with_full_history(torch.tensor([3.0, 1.0]))
    resumed = ImportanceTimesteps(2)
    resumed.load_state_dict(original.state_dict())
    draws = [importance.sample(9, torch.Generator().manual_seed(4)) for importance in (original, resumed)]
    assert draws[0][0].equal(draws[1][0])
    assert draws[0][1].equal(draws[1][1])
    with pytest.raises(ValueError, match="importance.*loss.*not finite"):
        original.update(torch.tensor([1]), torch.tensor([math.nan]))
