import numpy as np
import pytest
import scipy.stats
import torch

from ldm.diffusion import chain
from ldm.diffusion.loss import sample_timesteps, simple_loss, weight
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
        share = np.diff(scipy.stats.norm.cdf(np.log(u) - np.log1p(-u)))
    # The outermost bins expect less than 5 draws: a chi-square needs them merged.
    counts = torch.bincount(t, minlength=41)[1:].numpy()
    few = share * 100_000 < 5
    counts = np.append(counts[~few], counts[few].sum())
    expected = np.append(share[~few], share[few].sum()) * 100_000
    keep = expected > 0
    assert scipy.stats.chisquare(counts[keep], expected[keep]).pvalue > 1e-3


def test_timesteps_are_repeatable():
    for distribution in ("uniform", "logit_normal"):
        first, again = (sample_timesteps(1000, 16, distribution, torch.Generator().manual_seed(7)) for _ in range(2))
        assert first.dtype == torch.long
        assert first.equal(again)


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(cosine(100), prediction) for prediction in PREDICTIONS]
    + [(rectified_flow(100), prediction) for prediction in PREDICTIONS[1:]],
)
def test_min_snr_is_the_same_weight_on_z_0_in_every_space(schedule, prediction, randn):
    t = torch.tensor([1, 20, 50, 80, 99])
    z_0, eps, wrong = randn(5, 3, 2), randn(5, 3, 2), randn(5, 3, 2)
    z_t = chain.marginal(schedule, z_0, t, eps)
    output = chain.target(schedule, wrong, chain.to_eps(schedule, wrong, z_t, t), t, prediction)
    loss = simple_loss(schedule, output, z_0, eps, t, prediction, weighting="min_snr", gamma=2.0)
    a = schedule.alpha_bar[t]
    on_z_0 = (a / (1 - a)).clamp(max=2.0) * (wrong - z_0).square().mean((1, 2))
    torch.testing.assert_close(loss, on_z_0, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_simple_is_the_plain_squared_error_of_the_prediction(prediction, randn):
    schedule, t = linear(100), torch.tensor([1, 100])
    z_0, eps, output = (randn(2, 3, 4, dtype=torch.float32) for _ in range(3))
    loss = simple_loss(schedule, output.bfloat16(), z_0, eps, t, prediction)
    error = output.bfloat16().float() - chain.target(schedule, z_0, eps, t, prediction)
    torch.testing.assert_close(loss, error.square().mean((1, 2)))
    assert loss.dtype == torch.float32


def test_weights_are_known_numbers():
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


def test_errors():
    t = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="'cosine'; known: uniform, logit_normal"):
        sample_timesteps(10, 2, "cosine")
    with pytest.raises(ValueError, match="'snr'; known: simple, min_snr"):
        weight(linear(10), t, "snr", "eps")
    with pytest.raises(ValueError, match="known: eps"):
        weight(linear(10), t, "simple", "epsilon")
    with pytest.raises(ValueError, match="alpha_bar = 0"):
        weight(rectified_flow(10), t, "min_snr", "eps")
    with pytest.raises(ValueError, match="must be positive"):
        weight(linear(10), t, "min_snr", "eps", gamma=0.0)
    with pytest.raises(ValueError, match="0 <= s < t"):
        weight(linear(10), torch.tensor([0, 1]), "simple", "eps")
