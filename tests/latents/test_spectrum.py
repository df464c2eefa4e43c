"""Tests of ldm.latents.spectrum against closed forms, torch.distributions, NumPy and SciPy."""

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


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened_noise(rows: int, columns: int) -> torch.Tensor:
    """Return an array [rows, columns] whose sample covariance is exactly the identity."""
    x = randn(rows, columns)
    return torch.linalg.qr(x - x.mean(0))[0] * rows**0.5


def as_latents(x: torch.Tensor, side: int = 2) -> torch.Tensor:
    """Reshape rows of channels [n side side, C] -> [n, C, side, side]."""
    return x.reshape(-1, side, side, x.shape[1]).permute(0, 3, 1, 2)


@pytest.fixture
def moments() -> tuple[torch.Tensor, torch.Tensor]:
    """Moments of 50 latents of shape (3, 2, 4). The mean, spread and noise level differ between channels."""
    per_channel = torch.tensor([[0.3, 1.0, -2.0], [0.2, 1.5, 0.7], [-3.0, 0.5, -1.0]])[..., None, None].double()
    mean, log_variance = randn(50, 3, 2, 4), randn(50, 3, 2, 4, seed=1)
    return per_channel[0] + per_channel[1] * mean, per_channel[2] + 0.4 * log_variance


def test_rates_match_gaussian_kl_divergences(moments):
    """`kl` is the KL to N(0, 1), `information` the KL to N(E mean, std^2), the best Gaussian prior."""
    mean, log_variance = moments
    result = channel_statistics(mean, log_variance)
    posterior = Normal(mean, (0.5 * log_variance).exp())

    def rate(location, scale):
        prior = Normal(location[:, None, None].expand(3, 2, 4), scale[:, None, None].expand(3, 2, 4))
        return kl_divergence(posterior, prior).mean(0).sum((1, 2))

    torch.testing.assert_close(result.kl, rate(torch.zeros(3), torch.ones(3)).double())
    torch.testing.assert_close(result.information, rate(result.mean, result.std))
    assert (result.information <= result.kl).all()
    for shift, factor in ((0.05, 1.0), (-0.05, 1.0), (0.0, 1.03), (0.0, 0.97)):
        assert (rate(result.mean + shift, factor * result.std) > result.information).all()
    torch.testing.assert_close(result.kl_bits * math.log(2), result.kl)
    torch.testing.assert_close(result.information_bits * math.log(2), result.information)
    assert result.num_locations == 8


def test_information_of_gaussian_channel_equals_its_capacity():
    """With mean ~ N(0, signal) and a constant noise variance, I = log(1 + signal / noise) / 2 per location."""
    signal, noise = 1.5, 0.2
    mean = as_latents(whitened_noise(400, 2) * signal**0.5)
    result = channel_statistics(mean, torch.full_like(mean, math.log(noise)))
    expected = 4 * 0.5 * math.log(1 + signal / noise)
    torch.testing.assert_close(result.information, torch.full((2,), expected).double())
    torch.testing.assert_close(result.signal_share, torch.full((2,), signal / (signal + noise)).double())


def test_std_and_signal_share_match_samples(moments):
    mean, log_variance = (moment.repeat(400, 1, 1, 1) for moment in moments)
    z_raw = mean + (0.5 * log_variance).exp() * randn(*mean.shape, seed=2)
    result = channel_statistics(*moments)
    torch.testing.assert_close(result.mean, z_raw.mean((0, 2, 3)), rtol=0, atol=0.01)
    torch.testing.assert_close(result.std, z_raw.std((0, 2, 3)), rtol=0.01, atol=0)
    noise = (z_raw - mean).var((0, 2, 3))
    torch.testing.assert_close(result.signal_share, 1 - noise / z_raw.var((0, 2, 3)), rtol=0.02, atol=0)


def test_collapsed_channels_are_dead():
    """The channels are alive, equal to the prior, collapsed to a point, just above the threshold, and just below it."""
    mean, log_variance = randn(200, 5, 2, 2), torch.zeros(200, 5, 2, 2).double()
    log_variance[:, 0] = -4
    mean[:, 1] = 0
    mean[:, 2], log_variance[:, 2] = 3.0, -2.0
    for channel, nats in ((3, 1.1 * DEAD_NATS), (4, 0.9 * DEAD_NATS)):
        values = mean[:, channel]
        mean[:, channel] = (values - values.mean()) / values.std(correction=0) * math.expm1(2 * nats) ** 0.5
    result = channel_statistics(mean, log_variance)
    assert result.dead_channels == [1, 2, 4]
    torch.testing.assert_close(result.information[3:] / 4, torch.tensor([1.1, 0.9]).double() * DEAD_NATS)
    assert result.kl[1] == 0 and result.kl[2] > 10, "the KL to N(0, I) does not identify dead channels"


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_isotropic_channels_have_full_rank(channels):
    """The channel scales do not matter. Noise with the same variance as the signal halves the eigenvalues."""
    scale = torch.linspace(0.01, 30, channels).double()
    mean = as_latents(whitened_noise(400, channels) * scale) + 7
    result = channel_statistics(mean, torch.ones_like(mean) * 2 * scale.log()[:, None, None])
    eigenvalues = channel_spectrum(mean, result.std)
    torch.testing.assert_close(eigenvalues, torch.full((channels,), 0.5).double())
    assert effective_rank(eigenvalues) == pytest.approx(channels)
    assert participation_ratio(eigenvalues) == pytest.approx(channels)
    assert num_components(eigenvalues, 1.0) == channels


def test_data_on_a_line_has_rank_one():
    mean = randn(60, 1, 2, 2) * torch.tensor([1.0, -2.0, 0.5])[:, None, None]
    std = channel_statistics(mean, torch.full_like(mean, -30)).std
    for eigenvalues in (channel_spectrum(mean, std), latent_spectrum(mean[..., :1, :1], std)):
        assert effective_rank(eigenvalues) == pytest.approx(1, abs=1e-9)
        assert participation_ratio(eigenvalues) == pytest.approx(1, abs=1e-9)
        assert [num_components(eigenvalues, share) for share in (0.9, 0.99, 1.0)] == [1, 1, 1]


def test_dead_channel_does_not_change_the_spectrum(moments):
    mean, log_variance = moments
    dead_channel = torch.zeros(50, 1, 2, 4).double()
    all_means, all_log_variances = torch.cat([mean, dead_channel], 1), torch.cat([log_variance, dead_channel], 1)
    std, all_stds = channel_statistics(mean, log_variance).std, channel_statistics(all_means, all_log_variances).std
    spectrum = channel_spectrum(mean, std)
    torch.testing.assert_close(spectrum.sum(), channel_statistics(mean, log_variance).signal_share.sum())
    expected = torch.cat([spectrum, torch.zeros(1).double()])
    torch.testing.assert_close(channel_spectrum(all_means, all_stds), expected, rtol=1e-9, atol=1e-12)
    rank = effective_rank(latent_spectrum(mean, std))
    assert effective_rank(latent_spectrum(all_means, all_stds)) == pytest.approx(rank)


@pytest.mark.parametrize(("rows", "columns"), [(40, 7), (7, 40), (9, 9)])
def test_eigenvalues_match_numpy_for_either_gram_matrix(rows, columns):
    x = randn(rows, columns) * torch.linspace(0.1, 3, columns) + 5
    result = covariance_eigenvalues(x)
    expected = np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True))[::-1][: min(rows, columns)]
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-10)
    assert (result.diff() <= 0).all() and result.min() >= 0
    assert rows > columns or result[rows - 1] < 1e-10, "n images span n - 1 dimensions"


def test_effective_dimensions_match_scipy():
    eigenvalues = torch.tensor([5.0, 3.0, 1.5, 0.4, 0.1, 0.0], dtype=torch.float64)
    p = (eigenvalues / eigenvalues.sum()).numpy()
    assert effective_rank(eigenvalues) == pytest.approx(np.exp(scipy.stats.entropy(p)))
    assert participation_ratio(eigenvalues) == pytest.approx(1 / (p**2).sum())
    assert participation_ratio(eigenvalues) < effective_rank(eigenvalues)
    shares = {0.5: 1, 0.51: 2, 0.8: 2, 0.9: 3, 0.95: 3, 0.96: 4, 0.99: 4, 1.0: 5}
    assert {share: num_components(eigenvalues, share) for share in shares} == shares
    zeros = torch.zeros(4).double()
    assert (effective_rank(zeros), participation_ratio(zeros), num_components(zeros, 0.9)) == (0, 0, 0)


def test_patch_components_from_batches_match_covariance():
    images = (0.3 * randn(10, 3, 8, 8)).float()
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


def test_pca_counts_are_log_spaced_for_large_patches():
    assert pca_counts(12, 4) == list(range(1, 13)) and pca_counts(3, 20) == [1, 2, 3]
    counts = pca_counts(768, 35)
    assert {1, 35, 70, 768} <= set(counts) and len(counts) < 70 and counts == sorted(counts)


PCA_PSNR_DB = {n: 10.0 + n for n in range(1, 49)}
"""Held-out PSNR of a PCA by number of components."""
RULES = {
    "all_dead": (list(range(12)), 0.0, 0, 5.0, None, ["all 12 channels are dead", "0.01 nats", "loss.kl"]),
    "dead": (
        [3, 9],
        9.9,
        10,
        30.0,
        10,
        ["3, 9 of 12", "dead", "latent_channels=10"],
    ),
    "undertrained": ([], 11.5, 12, 21.5, None, ["PSNR is 0.5 dB lower", "PCA with 12 components"]),
    "redundant": ([], 8.0, 9, 30.0, 9, ["9 of 12 directions", "99%", "latent_channels=9"]),
    "more": ([], 10.8, 12, 30.0, 24, ["effective rank is 10.8 of 12", "latent_channels=24", "PCA", "12.0 dB"]),
    "keep": ([], 10.7, 12, 30.0, 12, ["effective rank is 10.7 of 12", "autoencoder.model.latent_channels=12"]),
}
"""By rule: dead channels, effective rank, number of directions, PSNR, recommended channels, phrases in the reason."""


@pytest.mark.parametrize("rule", RULES)
def test_recommendation_follows_the_first_matching_rule(rule):
    dead_channels, rank, num_directions, psnr_db, channels, details = RULES[rule]
    summary = {"effective_rank": rank, "components": {"0.99": num_directions}}
    result = recommend(dead_channels, summary, PCA_PSNR_DB, psnr_db, 12)
    assert result["rule"] == rule and result["latent_channels"] == channels
    assert all(detail in result["text"] for detail in details), result["text"]


def test_recommended_channels_never_exceed_half_of_the_patch_values():
    summary = {"effective_rank": 24.0, "components": {"0.99": 24}}
    assert recommend([], summary, PCA_PSNR_DB, 60.0, 24)["rule"] == "keep"
    summary = {"effective_rank": 20.0, "components": {"0.99": 20}}
    assert recommend([], summary, PCA_PSNR_DB, 60.0, 20)["latent_channels"] == 24
