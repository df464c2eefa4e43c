"""ldm.latents.spectrum against closed forms, torch.distributions, numpy and scipy."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch.distributions import Normal, kl_divergence

from ldm.latents.spectrum import (
    DEAD_NATS,
    channel_spectrum,
    channel_statistics,
    covariance_eigenvalues,
    effective_rank,
    latent_spectrum,
    num_components,
    participation_ratio,
    pca_counts,
    recommend,
)
from ldm.metrics.image import fold, patch_components, unfold


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def white(rows: int, columns: int) -> torch.Tensor:
    """[rows, columns] whose covariance is the identity, exactly."""
    x = draw(rows, columns)
    return torch.linalg.qr(x - x.mean(0))[0] * rows**0.5


def as_latents(x: torch.Tensor, side: int = 2) -> torch.Tensor:
    """Rows of channels [n side side, C] -> [n, C, side, side]."""
    return x.reshape(-1, side, side, x.shape[1]).permute(0, 3, 1, 2)


@pytest.fixture
def moments() -> tuple[torch.Tensor, torch.Tensor]:
    """Of 50 latents of 3 x 2 x 4, each channel with a mean, a spread and a noise of its own."""
    per_channel = torch.tensor([[0.3, 1.0, -2.0], [0.2, 1.5, 0.7], [-3.0, 0.5, -1.0]])[..., None, None].double()
    mean, log_variance = draw(50, 3, 2, 4), draw(50, 3, 2, 4, seed=1)
    return per_channel[0] + per_channel[1] * mean, per_channel[2] + 0.4 * log_variance


def test_rates_are_the_divergences_of_gaussians(moments):
    """To N(0, 1), and to the channel's own Gaussian; no other is nearer on average."""
    mean, log_variance = moments
    found = channel_statistics(mean, log_variance)
    posterior = Normal(mean, (0.5 * log_variance).exp())

    def rate(location, scale):
        prior = Normal(location[:, None, None].expand(3, 2, 4), scale[:, None, None].expand(3, 2, 4))
        return kl_divergence(posterior, prior).mean(0).sum((1, 2))

    torch.testing.assert_close(found.kl, rate(torch.zeros(3), torch.ones(3)).double())
    torch.testing.assert_close(found.information, rate(found.mean, found.std))
    assert (found.information <= found.kl).all()
    for moved, widened in ((0.05, 1.0), (-0.05, 1.0), (0.0, 1.03), (0.0, 0.97)):
        assert (rate(found.mean + moved, widened * found.std) > found.information).all()
    torch.testing.assert_close(found.kl_bits * math.log(2), found.kl)
    torch.testing.assert_close(found.information_bits * math.log(2), found.information)
    assert found.num_locations == 8


def test_information_of_a_gaussian_channel_is_its_capacity():
    """mean ~ N(0, signal) with noise of one variance: I = log(1 + signal / noise) / 2 per location."""
    signal, noise = 1.5, 0.2
    mean = as_latents(white(400, 2) * signal**0.5)
    found = channel_statistics(mean, torch.full_like(mean, math.log(noise)))
    expected = 4 * 0.5 * math.log(1 + signal / noise)
    torch.testing.assert_close(found.information, torch.full((2,), expected).double())
    torch.testing.assert_close(found.signal_share, torch.full((2,), signal / (signal + noise)).double())


def test_std_and_signal_are_those_of_draws(moments):
    mean, log_variance = (part.repeat(400, 1, 1, 1) for part in moments)
    z_raw = mean + (0.5 * log_variance).exp() * draw(*mean.shape, seed=2)
    found = channel_statistics(*moments)
    torch.testing.assert_close(found.mean, z_raw.mean((0, 2, 3)), rtol=0, atol=0.01)
    torch.testing.assert_close(found.std, z_raw.std((0, 2, 3)), rtol=0.01, atol=0)
    noise = (z_raw - mean).var((0, 2, 3))
    torch.testing.assert_close(found.signal_share, 1 - noise / z_raw.var((0, 2, 3)), rtol=0.02, atol=0)


def test_dead_channels_are_found_wherever_they_collapsed():
    """Alive, prior, a point off the prior, just above the threshold, just below it."""
    mean, log_variance = draw(200, 5, 2, 2), torch.zeros(200, 5, 2, 2).double()
    log_variance[:, 0] = -4
    mean[:, 1] = 0
    mean[:, 2], log_variance[:, 2] = 3.0, -2.0
    for channel, nats in ((3, 1.1 * DEAD_NATS), (4, 0.9 * DEAD_NATS)):
        line = mean[:, channel]
        mean[:, channel] = (line - line.mean()) / line.std(correction=0) * math.expm1(2 * nats) ** 0.5
    found = channel_statistics(mean, log_variance)
    assert found.dead == [1, 2, 4]
    torch.testing.assert_close(found.information[3:] / 4, torch.tensor([1.1, 0.9]).double() * DEAD_NATS)
    assert found.kl[1] == 0 and found.kl[2] > 10, "a KL to N(0, I) alone says nothing of a channel"


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_isotropic_channels_are_all_in_use(channels):
    """Whatever their scales are; noise of the variance of the signal halves the eigenvalues."""
    scale = torch.linspace(0.01, 30, channels).double()
    mean = as_latents(white(400, channels) * scale) + 7
    found = channel_statistics(mean, torch.ones_like(mean) * 2 * scale.log()[:, None, None])
    eigenvalues = channel_spectrum(mean, found.std)
    torch.testing.assert_close(eigenvalues, torch.full((channels,), 0.5).double())
    assert effective_rank(eigenvalues) == pytest.approx(channels)
    assert participation_ratio(eigenvalues) == pytest.approx(channels)
    assert num_components(eigenvalues, 1.0) == channels


def test_data_on_a_line_has_rank_one():
    mean = draw(60, 1, 2, 2) * torch.tensor([1.0, -2.0, 0.5])[:, None, None]
    std = channel_statistics(mean, torch.full_like(mean, -30)).std
    for eigenvalues in (channel_spectrum(mean, std), latent_spectrum(mean[..., :1, :1], std)):
        assert effective_rank(eigenvalues) == pytest.approx(1, abs=1e-9)
        assert participation_ratio(eigenvalues) == pytest.approx(1, abs=1e-9)
        assert [num_components(eigenvalues, share) for share in (0.9, 0.99, 1.0)] == [1, 1, 1]


def test_a_dead_channel_adds_nothing_to_the_spectrum(moments):
    mean, log_variance = moments
    dead = torch.zeros(50, 1, 2, 4).double()
    without = channel_statistics(mean, log_variance)
    found = channel_statistics(torch.cat([mean, dead], 1), torch.cat([log_variance, dead], 1))
    alive = channel_spectrum(mean, without.std)
    torch.testing.assert_close(alive.sum(), without.signal_share.sum())
    together = channel_spectrum(torch.cat([mean, dead], 1), found.std)
    torch.testing.assert_close(together, torch.cat([alive, torch.zeros(1).double()]), rtol=1e-9, atol=1e-12)
    whole = latent_spectrum(torch.cat([mean, dead], 1), found.std)
    assert effective_rank(whole) == pytest.approx(effective_rank(latent_spectrum(mean, without.std)))


@pytest.mark.parametrize(("rows", "columns"), [(40, 7), (7, 40), (9, 9)])
def test_both_sides_have_the_spectrum_of_the_covariance(rows, columns):
    x = draw(rows, columns) * torch.linspace(0.1, 3, columns) + 5
    found = covariance_eigenvalues(x)
    expected = np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True))[::-1][: min(rows, columns)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-10)
    assert (found.diff() <= 0).all() and found.min() >= 0
    assert rows > columns or found[rows - 1] < 1e-10, "n images span n - 1 dimensions"


def test_counts_of_dimensions_against_scipy():
    eigenvalues = torch.tensor([5.0, 3.0, 1.5, 0.4, 0.1, 0.0], dtype=torch.float64)
    p = (eigenvalues / eigenvalues.sum()).numpy()
    assert effective_rank(eigenvalues) == pytest.approx(np.exp(scipy.stats.entropy(p)))
    assert participation_ratio(eigenvalues) == pytest.approx(1 / (p**2).sum())
    assert participation_ratio(eigenvalues) < effective_rank(eigenvalues)
    shares = {0.5: 1, 0.51: 2, 0.8: 2, 0.9: 3, 0.95: 3, 0.96: 4, 0.99: 4, 1.0: 5}
    assert {share: num_components(eigenvalues, share) for share in shares} == shares
    nothing = torch.zeros(4).double()
    assert (effective_rank(nothing), participation_ratio(nothing), num_components(nothing, 0.9)) == (0, 0, 0)


def test_components_of_patches_come_from_batches():
    images = (0.3 * draw(10, 3, 8, 8)).float()
    images[:, 0] += images[:, 1]
    mean, basis = patch_components(images.split(3), 2)
    patches = unfold(images, 2).flatten(0, 2)
    torch.testing.assert_close(mean, patches.mean(0))
    covariance = basis.T @ torch.cov(patches.T) @ basis
    variances = covariance.diag()
    torch.testing.assert_close(covariance, variances.diag(), rtol=0, atol=1e-10)
    torch.testing.assert_close(basis.T @ basis, torch.eye(12).double())
    assert (variances.diff() <= 1e-12).all()
    torch.testing.assert_close(fold(unfold(images, 2), 2), images)


def test_a_curve_has_every_count_or_64_and_those_that_are_named():
    assert pca_counts(12, 4) == list(range(1, 13)) and pca_counts(3, 20) == [1, 2, 3]
    many = pca_counts(768, 35)
    assert {1, 35, 70, 768} <= set(many) and len(many) < 70 and many == sorted(many)


CURVE = {n: 10.0 + n for n in range(1, 49)}
RULES = {
    "all_dead": (list(range(12)), 0.0, 0, 5.0, None, ["all 12 channels are dead (under 0.01 nats", "loss.kl"]),
    "dead": (
        [3, 9],
        9.9,
        10,
        30.0,
        10,
        ["dead channels: 3, 9", "of 12", "latent_channels=10 would hold the same"],
    ),
    "undertrained": ([], 11.5, 12, 21.5, None, ["0.5 dB below a PCA of the same size"]),
    "redundant": ([], 8.0, 9, 30.0, 9, ["9 of 12 directions have 99 %", "latent_channels=9 would lose little"]),
    "more": ([], 10.8, 12, 30.0, 24, ["effective rank is 10.8 of 12", "latent_channels=24", "a PCA gains 12.0 dB"]),
    "keep": ([], 10.7, 12, 30.0, 12, ["effective rank is 10.7 of 12", "keep autoencoder.model.latent_channels=12"]),
}


@pytest.mark.parametrize("rule", RULES)
def test_one_recommendation_by_the_first_rule_that_holds(rule):
    dead, rank, needed, psnr_db, channels, said = RULES[rule]
    between = {"effective_rank": rank, "components": {"0.99": needed}}
    found = recommend(dead, between, CURVE, psnr_db, 12)
    assert found["rule"] == rule and found["latent_channels"] == channels
    assert all(part in found["text"] for part in said), found["text"]


def test_more_channels_stop_at_half_of_the_pixels():
    full = {"effective_rank": 24.0, "components": {"0.99": 24}}
    assert recommend([], full, CURVE, 60.0, 24)["rule"] == "keep"
    full = {"effective_rank": 20.0, "components": {"0.99": 20}}
    assert recommend([], full, CURVE, 60.0, 20)["latent_channels"] == 24
