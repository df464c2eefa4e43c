"""The number of latent dimensions in use: the rate and spread of each channel, and the spectrum of the whole latent.

Setting: z_raw ~ N(mean(x), exp(log_variance(x))), both [n, C, h, w], independent over channels and locations given x.
Over n images and h w locations, the variance of z_raw in a channel is the variance of the posterior means (the signal)
plus the average variance of the posteriors (the noise):

    std^2 = Var mean + E exp(log_variance)        z = (z_raw - E mean) / std

Spectra are computed for the signal in z, the input of stage 2: Cov((mean - E mean) / std). They are invariant to the
scale of a channel. A channel without signal contributes nothing, even though its z_raw varies because of the noise.
Variances and covariances are biased (divided by n, not n - 1), and all computations use float64.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DEAD_NATS = 0.01
"""A channel is dead if it carries fewer than this many nats of information about x per location."""
FULL_RANK = 0.9
"""If the effective rank is at least this fraction of the number of channels, all channels count as in use."""
NUM_PCA_POINTS = 64
"""Approximate number of points on a PCA curve. For a small patch, there is one point for every number of components."""


@dataclass(frozen=True)
class ChannelStatistics:
    """Statistics per channel, each [C]. `kl` and `information` are in nats per image, summed over locations."""

    kl: Tensor
    information: Tensor
    mean: Tensor
    std: Tensor
    signal_share: Tensor
    """Var mean / std^2, in [0, 1]."""
    num_locations: int

    @property
    def kl_bits(self) -> Tensor:
        """KL in bits per image."""
        return self.kl / math.log(2)

    @property
    def information_bits(self) -> Tensor:
        """Information in bits per image."""
        return self.information / math.log(2)

    @property
    def dead_channels(self) -> list[int]:
        """Indices of the channels with less than DEAD_NATS of information per location.

        The KL to N(0, I) would not detect channels that collapsed to a point other than 0, because it is large there.
        """
        return (self.information / self.num_locations < DEAD_NATS).nonzero().flatten().tolist()


def channel_statistics(mean: Tensor, log_variance: Tensor) -> ChannelStatistics:
    """Return the mean, the standard deviation and two rates of each channel:

        kl          = sum over locations of E_x KL(q(z_raw|x) || N(0, 1)) = h w / 2 E[mean^2 + var - 1 - log var]
        information = the same with the prior N(E mean, std^2) = h w / 2 (log std^2 - E[log var])

    N(E mean, std^2) is the Gaussian prior with the smallest KL, so information <= kl. Among all priors, the aggregate
    posterior has the smallest KL, which equals the mutual information between x and a location. `information` is
    therefore an upper bound on the mutual information. Both rates are sums over marginals, so information shared by
    several channels or locations is counted multiple times.

    Args:
        mean, log_variance: [n, C, h, w].

    Source: Hoffman & Johnson 2016, "ELBO surgery". Dead channels are the opposite of the active units in Burda et al.
    2016, arXiv:1509.00519, section 5, where the threshold of 0.01 applies to Var mean instead.
    """
    mean, log_variance = mean.double(), log_variance.double()
    locations, dims = mean[0, 0].numel(), (0, 2, 3)
    variance = log_variance.exp()
    signal = mean.var(dims, correction=0)
    total = signal + variance.mean(dims)
    return ChannelStatistics(
        kl=locations / 2 * (mean.square() + variance - 1 - log_variance).mean(dims),
        information=locations / 2 * (total.log() - log_variance.mean(dims)),
        mean=mean.mean(dims),
        std=total.sqrt(),
        signal_share=signal / total,
        num_locations=locations,
    )


def channel_spectrum(mean: Tensor, std: Tensor) -> Tensor:
    """Return the eigenvalues of the signal's covariance between channels: [C], in descending order.

    The covariance is taken over all images and locations. The sum of the eigenvalues equals the sum of the signal
    shares, which is at most C.
    """
    return covariance_eigenvalues(_standardised(mean, std).transpose(0, 1).flatten(1).T)


def latent_spectrum(mean: Tensor, std: Tensor) -> Tensor:
    """Return the eigenvalues of the signal's covariance over D = C h w dimensions: [min(n, D)], in descending order.

    With n images, at most n - 1 eigenvalues are nonzero. An effective rank close to n indicates too few images.
    """
    return covariance_eigenvalues(_standardised(mean, std).flatten(1))


def _standardised(mean: Tensor, std: Tensor) -> Tensor:
    mean = mean.double()
    return (mean - mean.mean((0, 2, 3), keepdim=True)) / std[:, None, None]


def covariance_eigenvalues(x: Tensor) -> Tensor:
    """Return the eigenvalues of the covariance of the rows of x [n, d]: [min(n, d)], nonnegative, in descending order.

    Uses the smaller of the two Gram matrices: X^T X (d x d) and X X^T (n x n) have the same nonzero eigenvalues.
    """
    x = x.double()
    x = x - x.mean(0)
    gram = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
    return torch.linalg.eigvalsh(gram / len(x)).flip(0).clamp(min=0)


def effective_rank(eigenvalues: Tensor) -> float:
    """Return exp(H(p)), where H is the entropy and p are the eigenvalues divided by their sum.

    The effective rank is k for k equal nonzero eigenvalues, and 0 if all eigenvalues are 0.

    Source: Roy & Vetterli 2007, "The effective rank", eqs. 3-5, applied to the covariance matrix, whose singular values
    are its eigenvalues.
    """
    p = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
    return torch.special.entr(p).sum().exp().item() if len(p) else 0.0


def participation_ratio(eigenvalues: Tensor) -> float:
    """Return (sum of eigenvalues)^2 / (sum of squared eigenvalues).

    The ratio is k for k equal nonzero eigenvalues, and 0 if all eigenvalues are 0. In terms of the normalised
    eigenvalues p, the ratio is 1 / sum p^2, the exponential of the Renyi entropy of order 2. It therefore never exceeds
    the effective rank.

    Source: Gao et al. 2017, bioRxiv 214262.
    """
    p = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
    return (1 / p.square().sum()).item() if len(p) else 0.0


def num_components(eigenvalues: Tensor, share: float) -> int:
    """Return the smallest number of eigenvalues that sum to at least `share` of the total; 0 if all are 0."""
    cumulative = eigenvalues.cumsum(0)
    if cumulative[-1] == 0:
        return 0
    # a tolerance prevents rounding errors in long sums from adding a component
    return int((cumulative < (share - 1e-12) * cumulative[-1]).sum()) + 1


def pca_counts(size: int, channels: int) -> list[int]:
    """Return the numbers of components, from 1 to `size`, at which to evaluate a PCA.

    If `size` is at most NUM_PCA_POINTS, return every number. Otherwise, return about NUM_PCA_POINTS log-spaced numbers.
    C and min(2 C, size / 2), where C is the number of channels, are always included.
    """
    spaced = torch.logspace(0, math.log10(size), NUM_PCA_POINTS, dtype=torch.float64).round().int().tolist()
    required = (min(channels, size), min(2 * channels, size // 2))
    return sorted(
        {*(range(1, size + 1) if size <= NUM_PCA_POINTS else spaced), *(count for count in required if count > 0)}
    )


def recommend(
    dead_channels: list[int], channel_summary: dict[str, Any], pca: dict[int, float], psnr_db: float, channels: int
) -> dict[str, Any]:
    """Recommend a number C of latent channels. Return the first rule that applies, the number (or None) and a reason.

    1. all_dead: all channels are dead, so no number can be recommended. Use a smaller KL weight.
    2. dead: some channels are dead. Remove them, because they carry no information.
    3. undertrained: a PCA with C components, the best linear code, has a higher held-out PSNR. Train longer.
    4. redundant: fewer than C directions in channel space contain 99% of the signal. Use one channel per direction.
    5. more: the effective rank is at least FULL_RANK * C, so all channels are in use. Double the number of channels, up
       to half the number of values in a patch (a compression factor of 2). The reason includes the PSNR that a PCA
       gains with the additional components.
    6. keep: no other rule applies.

    Rules 4 to 6 consider only linear structure in this autoencoder. To measure the quality with a different number of
    channels, train an autoencoder with that number.

    Args:
        channel_summary: Summary of the channel spectrum, in the format of latents_report.json.
        pca: Held-out PSNR of a PCA in dB, by number of components.
    """
    key, size = "autoencoder.model.latent_channels", max(pca)
    rank, num_directions = channel_summary["effective_rank"], channel_summary["components"]["0.99"]
    pca_lead, larger = pca[min(channels, size)] - psnr_db, min(2 * channels, size // 2)
    limit = f"less than {DEAD_NATS} nats per location"
    rank_text = f"the effective rank is {rank:.1f} of {channels}"
    rule: str = "keep"
    count: int | None = channels
    text = f"{rank_text}. Keep {key}={channels}."
    if len(dead_channels) == channels:
        rule, count = "all_dead", None
        text = f"all {channels} channels are dead ({limit}). Train again with a smaller autoencoder.loss.kl."
    elif dead_channels:
        rule, count = "dead", channels - len(dead_channels)
        indices = ", ".join(map(str, dead_channels))
        text = f"channels {indices} of {channels} are dead ({limit}). {key}={count} would lose no information."
    elif pca_lead > 0:
        rule, count = "undertrained", None
        text = f"the PSNR is {pca_lead:.1f} dB lower than that of a PCA with {channels} components."
        text = f"{text} Train longer, or with a smaller autoencoder.loss.kl."
    elif num_directions < channels:
        rule, count = "redundant", num_directions
        text = f"{count} of {channels} directions contain 99% of the signal. {key}={count} would lose little."
    elif rank >= FULL_RANK * channels and larger > channels:
        rule, count = "more", larger
        gain = pca[larger] - pca[channels]
        text = f"{rank_text}. More channels may help. Try {key}={larger}, with which a PCA gains {gain:.1f} dB."
    return {"rule": rule, "latent_channels": count, "text": text}
