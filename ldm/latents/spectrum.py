"""How many dimensions of a latent the images use: the rate and spread of each channel, and the spectrum of them all.

Setting: z_raw ~ N(mean(x), exp(log_variance(x))), both [n, C, h, w], independent over channels and locations given x.
Per channel, over n images and h w locations, the variance of z_raw is that of the means, the signal, and the noise
around them:

    std^2 = Var mean + E exp(log_variance)        z = (z_raw - E mean) / std

Spectra are those of the signal in z, which is what stage 2 sees: Cov((mean - E mean) / std). They do not change with
the scale of a channel, and a channel that holds nothing adds nothing, although its z_raw has the variance of its noise.
Moments are divided by their number, not by one less, and everything is float64.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DEAD_NATS = 0.01
"""A channel that holds less than this about x, per location, is dead."""
FULL_RANK = 0.9
"""Channels are in use nearly equally whose effective rank is this share of their number at least."""
PCA_COUNTS = 64
"""At how many numbers of components a PCA is measured, where a patch has more."""


@dataclass(frozen=True)
class ChannelStatistics:
    """What each channel holds, [C] each; the rates in nats per image, summed over the locations."""

    kl: Tensor
    information: Tensor
    mean: Tensor
    std: Tensor
    signal_share: Tensor
    """Var mean / std^2, in [0, 1]."""
    num_locations: int

    @property
    def kl_bits(self) -> Tensor:
        """The KL in bits per image."""
        return self.kl / math.log(2)

    @property
    def information_bits(self) -> Tensor:
        """The information in bits per image."""
        return self.information / math.log(2)

    @property
    def dead(self) -> list[int]:
        """The channels with less than DEAD_NATS of information per location, by index.

        Their KL to N(0, I) is not asked: one that collapsed to a point other than 0 has a KL and holds nothing.
        """
        return (self.information / self.num_locations < DEAD_NATS).nonzero().flatten().tolist()


def channel_statistics(mean: Tensor, log_variance: Tensor) -> ChannelStatistics:
    """Two rates of each channel, beside its mean and std:

        kl          = sum over locations of E_x KL(q(z_raw|x) || N(0, 1)) = h w / 2 E[mean^2 + var - 1 - log var]
        information = the same against the channel's own N(E mean, std^2) = h w / 2 (log std^2 - E[log var])

    No other Gaussian prior of a channel has a smaller KL than its own, so information <= kl; and no prior has a smaller
    one than the aggregate posterior, with which it is the mutual information of x and a location: information is an
    upper bound on that. Both are about the marginals: what channels and locations share is counted every time.

    Args:
        mean, log_variance: [n, C, h, w].

    Source: Hoffman & Johnson 2016, "ELBO surgery"; dead channels are the complement of the active units of Burda et al.
    2016, arXiv:1509.00519, section 5, whose threshold of 0.01 is on Var mean.
    """
    mean, log_variance = mean.double(), log_variance.double()
    locations, every = mean[0, 0].numel(), (0, 2, 3)
    variance = log_variance.exp()
    signal = mean.var(every, correction=0)
    total = signal + variance.mean(every)
    return ChannelStatistics(
        kl=locations / 2 * (mean.square() + variance - 1 - log_variance).mean(every),
        information=locations / 2 * (total.log() - log_variance.mean(every)),
        mean=mean.mean(every),
        std=total.sqrt(),
        signal_share=signal / total,
        num_locations=locations,
    )


def channel_spectrum(mean: Tensor, std: Tensor) -> Tensor:
    """Eigenvalues of the signal's covariance between channels, over all images and locations: [C], largest first.

    Their sum is that of the channels' signal shares: C at most.
    """
    return covariance_eigenvalues(_standardised(mean, std).transpose(0, 1).flatten(1).T)


def latent_spectrum(mean: Tensor, std: Tensor) -> Tensor:
    """Eigenvalues of the signal's covariance over whole latents of D = C h w dimensions: [min(n, D)], largest first.

    Of n images at most n - 1 are not zero: a count of dimensions near n says that there were too few images.
    """
    return covariance_eigenvalues(_standardised(mean, std).flatten(1))


def _standardised(mean: Tensor, std: Tensor) -> Tensor:
    mean = mean.double()
    return (mean - mean.mean((0, 2, 3), keepdim=True)) / std[:, None, None]


def covariance_eigenvalues(x: Tensor) -> Tensor:
    """Eigenvalues of the covariance of the rows of x [n, d]: [min(n, d)], largest first, none below 0.

    Through the smaller side: X^T X (d x d) and X X^T (n x n) have the same eigenvalues but for zeros.
    """
    x = x.double()
    x = x - x.mean(0)
    gram = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
    return torch.linalg.eigvalsh(gram / len(x)).flip(0).clamp(min=0)


def effective_rank(eigenvalues: Tensor) -> float:
    """exp(H(p)) with p = eigenvalues / their sum: k for k equal ones, 0 where all are 0.

    Source: Roy & Vetterli 2007, "The effective rank", eqs. 3-5, of the covariance, whose singular values they are.
    """
    p = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
    return torch.special.entr(p).sum().exp().item() if len(p) else 0.0


def participation_ratio(eigenvalues: Tensor) -> float:
    """(sum of the eigenvalues)^2 / sum of their squares: k for k equal ones, 0 where all are 0.

    1 / sum p^2 where the effective rank is exp(-sum p log p): the exponential of Renyi's entropy of order 2, so never
    above the effective rank. Source: Gao et al. 2017, bioRxiv 214262.
    """
    p = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
    return (1 / p.square().sum()).item() if len(p) else 0.0


def num_components(eigenvalues: Tensor, share: float) -> int:
    """How many of the largest eigenvalues have this share of the sum at least, from (0, 1]; 0 where all are 0."""
    reached = eigenvalues.cumsum(0)
    if reached[-1] == 0:
        return 0
    # rounding in a sum of thousands of terms must not ask for one component more
    return int((reached < (share - 1e-12) * reached[-1]).sum()) + 1


def pca_counts(size: int, channels: int) -> list[int]:
    """Numbers of components out of 1..size at which a PCA is measured: all, or some, with C and 2 C among them."""
    spaced = torch.logspace(0, math.log10(size), PCA_COUNTS, dtype=torch.float64).round().int().tolist()
    named = (min(channels, size), min(2 * channels, size // 2))
    return sorted({*(range(1, size + 1) if size <= PCA_COUNTS else spaced), *(count for count in named if count > 0)})


def recommend(
    dead: list[int], between: dict[str, Any], pca: dict[int, float], psnr_db: float, channels: int
) -> dict[str, Any]:
    """One recommendation: the first of these rules that holds, its reason, and the channels that it asks for, if any.

    1. all_dead: every channel is dead. A smaller weight of the KL; no size can be read from this autoencoder.
    2. dead: some are. As many fewer, because they hold nothing.
    3. undertrained: held-out PSNR below that of a PCA of the same size, the best linear code. More training first.
    4. redundant: fewer than C directions between channels have 99 % of the signal. As many as those.
    5. more: the effective rank is FULL_RANK C at least, so that all channels are in use and nearly equally. Twice as
       many, and at most half of a patch's values, which is a compression by 2; the PCA's gain is named beside it.
    6. keep: none of these.

    Rules 4 to 6 read linear structure and this autoencoder alone: what a size is worth, only training it tells.

    Args:
        between: The spectrum between channels, as latents_report.json has it.
        pca: Held-out PSNR in dB by number of channels.
    """
    key, size = "autoencoder.model.latent_channels", max(pca)
    rank, needed = between["effective_rank"], between["components"]["0.99"]
    behind, more = pca[min(channels, size)] - psnr_db, min(2 * channels, size // 2)
    below = f"under {DEAD_NATS} nats per location"
    of_rank = f"the effective rank is {rank:.1f} of {channels}"
    rule: str = "keep"
    asked: int | None = channels
    text = f"{of_rank}: keep {key}={channels}."
    if len(dead) == channels:
        rule, asked = "all_dead", None
        text = f"all {channels} channels are dead ({below}). Train again with a smaller autoencoder.loss.kl."
    elif dead:
        rule, asked = "dead", channels - len(dead)
        text = f"dead channels: {', '.join(map(str, dead))} ({below}) of {channels}. {key}={asked} would hold the same."
    elif behind > 0:
        rule, asked = "undertrained", None
        text = f"{behind:.1f} dB below a PCA of the same size: train longer, or with a smaller autoencoder.loss.kl."
    elif needed < channels:
        rule, asked = "redundant", needed
        text = f"{needed} of {channels} directions have 99 % of the signal: {key}={needed} would lose little."
    elif rank >= FULL_RANK * channels and more > channels:
        rule, asked = "more", more
        gain = pca[more] - pca[channels]
        text = f"{of_rank}: more channels may pay. Try {key}={more}, with which a PCA gains {gain:.1f} dB."
    return {"rule": rule, "latent_channels": asked, "text": text}
