"""How many bits the two stages need for an image: the two-stage variational bound.

    -log p(x) <= E_q[ -log p(x | z_raw) + log q(z_raw | x) + L_VLB(z) ] + h w sum_c log std_c

in nats, summed over the dimensions of 8-bit images x. z = (z_raw - mean) / std is the standardised latent that the
chain knows, and the last term its change of variables. p(x | z_raw) is a Gaussian around the decoded image, one scale
per colour fitted on the training split, integrated over each 8-bit value's bin. The bound is that of p(x | condition)
where the model has one: the caption or class of each image, without guidance.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.diffusion.bound import Bound, variational_bound
from ldm.diffusion.bound_terms import discretised_nll
from ldm.diffusion.chain import at_least_float32, marginal
from ldm.diffusion.ode_likelihood import ode_log_likelihood
from ldm.errors import UserError
from ldm.networks.conditioning import Condition
from ldm.pipeline import LatentDiffusionPipeline, sample_generators

BIN = 2 / 255
"""Width of an 8-bit value's bin in images of [-1, 1]."""

LOG_2PI_E = math.log(2 * math.pi) + 1
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Terms:
    """Each image's terms of a bound on -log p(x), in nats, [n] each; `total` is their sum.

    Args:
        parts: Terms by name, in the order of the table.
        num_dims: Dimensions of an image, 3 H W: what bits per dimension are of.
        monte_carlo_variance: Of each image's total, from the choice of t and noise in the chain alone; None where
            the bound has no chain.
    """

    parts: dict[str, Tensor]
    num_dims: int
    monte_carlo_variance: Tensor | None = None
    chain: Bound | None = field(default=None, repr=False)

    @property
    def total(self) -> Tensor:
        return torch.stack(list(self.parts.values())).sum(0)

    def bits_per_dim(self, nats: Tensor) -> Tensor:
        """Nats per image -> bits per dimension of the image (a pixel's colour value)."""
        return nats / (self.num_dims * math.log(2))

    def figures(self) -> dict[str, float]:
        """Means over the images in bits/dim, the total's standard error between images, and that of the estimate.

        The first says how far the mean over other images may be; the second how far this one is from what all t
        and infinitely much noise would give for the same images.
        """
        found = {name: self.bits_per_dim(values).mean().item() for name, values in self.parts.items()}
        found["total"], found["standard_error"] = mean_and_error(self.bits_per_dim(self.total))
        if self.monte_carlo_variance is not None:
            error = self.monte_carlo_variance.sum().sqrt() / len(self.total)
            found["monte_carlo_error"] = self.bits_per_dim(error).item()
        return found


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error between images (nan for a single one)."""
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def require_density(autoencoder: Autoencoder) -> None:
    """Refuse an autoencoder that defines no q(z | x) and p(x | z).

    Raises:
        UserError: naming it.
    """
    name = type(autoencoder.model).__name__
    if not autoencoder.has_density:
        raise UserError(
            f"The autoencoder {name} has no density over its latents, so images have no likelihood under it. "
            "Train a KL one (autoencoder=patch or kl_f2, kl_f4, kl_f8) for likelihoods."
        )


def check_eight_bit(images: Tensor) -> None:
    """Refuse images that are no 8-bit values: a discretised likelihood of them would mean nothing.

    Raises:
        UserError: naming the first image and the offending value.
    """
    values = (images.double() + 1) * 127.5
    off = ((values - values.round()).abs() > 1e-3) | (values < -1e-3) | (values > 255 + 1e-3) | ~values.isfinite()
    if off.any():
        first = int(off.flatten(1).any(1).nonzero()[0])
        value = values[first][off[first]][0].item()
        raise UserError(
            f"Image {first} holds the value {value:.4g}, which is no 8-bit value (0, 1, ..., 255). Bits per dimension "
            "are those of 8-bit images: give images [n, 3, H, W] as k / 127.5 - 1."
        )


class _Encoded(NamedTuple):
    """One draw z_raw ~ q(z_raw | x) per image, its -log p(x | z_raw), and what is exact: the entropy of q(z_raw | x)
    and the expectation of -log N(z_raw; 0, I) under it."""

    z_raw: Tensor
    decoder: Tensor
    entropy: Tensor
    standard_normal: Tensor


def _encode(autoencoder: Autoencoder, images: Tensor, generators: list[torch.Generator], batch_size: int) -> _Encoded:
    statistics = autoencoder.statistics
    assert statistics is not None
    scale = torch.tensor(statistics.decoder_scale, dtype=torch.float64)[:, None, None]
    found: list[_Encoded] = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        mean, log_variance = (at_least_float32(moment).cpu() for moment in autoencoder.encode(part))
        noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators[start : start + len(part)]])
        z_raw = mean + (0.5 * log_variance).exp() * noise
        decoded = autoencoder.decode(z_raw).cpu().double()
        decoder = discretised_nll(part.double(), decoded, scale, BIN, low=-1.0, high=1.0).flatten(1).sum(1)
        mean, log_variance = mean.double(), log_variance.double()
        entropy = 0.5 * (LOG_2PI_E + log_variance).flatten(1).sum(1)
        standard_normal = 0.5 * (mean.square() + log_variance.exp() + LOG_2PI_E - 1).flatten(1).sum(1)
        found.append(_Encoded(z_raw, decoder, entropy, standard_normal))
    return _Encoded(*(torch.cat(values) for values in zip(*found, strict=True)))


def vae_bound(autoencoder: Autoencoder, images: Tensor, *, seed: int = 0, batch_size: int = 64) -> Terms:
    """The autoencoder's own bound, with the prior N(0, I) on z_raw that its KL term trains towards.

        -log p(x) <= E_q[-log p(x | z_raw)] + KL(q(z_raw | x) || N(0, I))

    Args:
        images: [n, 3, H, W] in [-1, 1], 8-bit values.

    Raises:
        UserError: an autoencoder without a density, images that are not 8-bit.
    """
    require_density(autoencoder)
    check_eight_bit(images)
    encoded = _encode(autoencoder, images, sample_generators(seed, range(len(images))), batch_size)
    return _standard_normal_prior(encoded, images[0].numel())


def _standard_normal_prior(encoded: _Encoded, num_dims: int) -> Terms:
    parts = {"decoder": encoded.decoder, "encoder": -encoded.entropy, "N(0, I) prior": encoded.standard_normal}
    return Terms(parts, num_dims)


@dataclass(frozen=True)
class TwoStage:
    """What an image costs under three priors of its latent, each with the same draw of z_raw.

    Args:
        chain: The ancestral chain's variational bound.
        vae: The autoencoder alone: N(0, I) on z_raw.
        ode: The probability-flow ODE's density of z_1 in place of the chain's steps from T to 1; None unless asked for.
        ode_evaluations: Network calls that the ODE took for the last batch.
        ode_probe_variance: Of each image's total, from Hutchinson's probes; None with a single probe.
    """

    chain: Terms
    vae: Terms
    ode: Terms | None = None
    ode_evaluations: int = 0
    ode_probe_variance: Tensor | None = None


def two_stage_bound(
    pipeline: LatentDiffusionPipeline,
    images: Tensor,
    condition: Condition,
    *,
    seed: int = 0,
    variance: str | None = None,
    steps: int | None = None,
    batch_size: int = 64,
    ode: dict[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> TwoStage:
    """The bound of every image, term by term. All that image i draws depends on seed and i alone.

    Args:
        images: [n, 3, H, W] in [-1, 1], 8-bit values.
        condition: Batch-first tensors for the n images; {} for none.
        variance: Sigma of the reverse steps; None: the model's own.
        steps: Terms of the chain per image, stratified over t; None: all T.
        ode: Options of `ode_log_likelihood` (rtol, atol, probes), to compute its bound as well.
        on_progress: Called as on_progress(what, done, total).

    Raises:
        UserError: an autoencoder without a density, images that are not 8-bit, latents that are not finite, a
            variance that this model does not have.
    """
    require_density(pipeline.autoencoder)
    check_eight_bit(images)
    pipeline.network.eval()
    generators = sample_generators(seed, range(len(images)))
    encoded = _encode(pipeline.autoencoder, images, generators, batch_size)
    z_0 = pipeline.autoencoder.standardise(encoded.z_raw)
    statistics = pipeline.autoencoder.statistics
    assert statistics is not None
    volume = z_0[0, 0].numel() * torch.tensor(statistics.latent_std, dtype=torch.float64).log().sum().item()
    moved = {name: value.to(pipeline.device) for name, value in condition.items()}
    report = on_progress or (lambda *_: None)
    try:
        chain = variational_bound(
            pipeline.denoiser(),
            z_0.to(pipeline.device),
            moved,
            generators=generators,
            variance=variance or pipeline.variance,
            z_0_mse=pipeline.z_0_mse,
            steps=steps,
            batch_size=batch_size,
            on_batch=lambda done, total: report("chain", done, total),
        )
    except ValueError as error:
        raise UserError(f"The bound cannot be computed: {error}.") from error
    num_dims = images[0].numel()
    parts = {"decoder": encoded.decoder, "encoder": volume - encoded.entropy}
    found = TwoStage(
        chain=Terms(
            parts | {"L_T": chain.prior, "sum of L_t-1": chain.layers, "L_0": chain.last},
            num_dims,
            chain.monte_carlo_variance,
            chain,
        ),
        vae=_standard_normal_prior(encoded, num_dims),
    )
    if ode is None:
        return found
    density, evaluations, probe_variance = _ode_prior(pipeline, z_0, moved, seed, batch_size, ode, report)
    terms = Terms(parts | {"ODE, z_1": density, "L_0": chain.last}, num_dims)
    return TwoStage(found.chain, found.vae, terms, evaluations, probe_variance)


def _ode_prior(
    pipeline: LatentDiffusionPipeline,
    z_0: Tensor,
    condition: Condition,
    seed: int,
    batch_size: int,
    options: dict[str, Any],
    report: OnProgress,
) -> tuple[Tensor, int, Tensor | None]:
    """-log p_ODE(z_1) + log q(z_1 | z_0) per image: what the ODE costs where the chain costs L_T and the steps to 1.

    The entropy of q(z_1 | z_0) is exact. z_1 and the probes come from generators of their own, so that the chain's
    numbers do not depend on whether the ODE's were asked for.
    """
    schedule, n = pipeline.schedule, len(z_0)
    generators = sample_generators(seed + 1, range(n))
    eps = torch.stack([torch.randn(z_0.shape[1:], generator=g) for g in generators])
    z_1 = marginal(schedule, z_0, 1, eps)
    entropy = 0.5 * z_0[0].numel() * (LOG_2PI_E + math.log(1 - schedule.alpha_bar[1].item()))
    densities, variances, evaluations = [], [], 0
    for start in range(0, n, batch_size):
        stop = min(start + batch_size, n)
        part = {name: value[start:stop] for name, value in condition.items()}
        found = ode_log_likelihood(
            pipeline.denoiser(),
            z_1[start:stop].to(pipeline.device),
            part,
            generators=generators[start:stop],
            **options,
        )
        densities.append(-found.log_likelihood.cpu().double() - entropy)
        evaluations += found.evaluations
        if found.probe_variance is not None:
            variances.append(found.probe_variance.cpu().double())
        report("ODE", stop, n)
    return torch.cat(densities), evaluations, torch.cat(variances) if variances else None
