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
from ldm.diffusion.bound import Bound, LastTerm, NotFiniteError, variational_bound
from ldm.diffusion.bound_terms import discretised_nll
from ldm.diffusion.chain import at_least_float32, marginal
from ldm.diffusion.continuous.ode_likelihood import ode_log_likelihood
from ldm.diffusion.denoiser import Condition
from ldm.errors import UserError
from ldm.likelihood.checks import check_chain, require_density
from ldm.metrics.metric import Metric, mean_metric
from ldm.runtime.random import sample_generators, torch_generator
from ldm.sampling.pipeline import LatentDiffusionPipeline

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

    def metrics(self) -> dict[str, Metric]:
        """Means of every term and of the total over the images, in bits/dim, with their standard errors between images.

        They say how far the mean over other images may be.
        """
        return {name: mean_metric(self.bits_per_dim(x)) for name, x in {**self.parts, "total": self.total}.items()}

    @property
    def monte_carlo_error(self) -> float | None:
        """How far the mean total is from what all t and infinitely much noise would give for the same latents."""
        if self.monte_carlo_variance is None:
            return None
        return self.bits_per_dim(self.monte_carlo_variance.sum().sqrt() / len(self.total)).item()


def draw_latents(
    autoencoder: Autoencoder, images: Tensor, generators: list[torch.Generator]
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and log-variance of q(z_raw | x), and one draw per image with noise from its own generator."""
    mean, log_variance = (at_least_float32(moment).cpu() for moment in autoencoder.encode(images))
    noise = torch.stack([torch.randn(mean.shape[1:], generator=own) for own in generators])
    return mean, log_variance, mean + (0.5 * log_variance).exp() * noise


class _Encoded(NamedTuple):
    """One draw z_raw ~ q(z_raw | x) per image, its -log p(x | z_raw), and what is exact: the entropy of q(z_raw | x)
    and the expectation of -log N(z_raw; 0, I) under it."""

    z_raw: Tensor
    decoder: Tensor
    entropy: Tensor
    standard_normal: Tensor


def _encode_images(
    autoencoder: Autoencoder, images: Tensor, generators: list[torch.Generator], batch_size: int
) -> _Encoded:
    scale = torch.tensor(require_density(autoencoder).decoder_scale, dtype=torch.float64)[:, None, None]
    found: list[_Encoded] = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        mean, log_variance, z_raw = draw_latents(autoencoder, part, generators[start : start + len(part)])
        decoded = autoencoder.decode(z_raw).cpu().double()
        decoder = discretised_nll(part.double(), decoded, scale, BIN, low=-1.0, high=1.0).flatten(1).sum(1)
        mean, log_variance = mean.double(), log_variance.double()
        entropy = 0.5 * (LOG_2PI_E + log_variance).flatten(1).sum(1)
        standard_normal = 0.5 * (mean.square() + log_variance.exp() + LOG_2PI_E - 1).flatten(1).sum(1)
        wrong = ~(decoder + entropy + standard_normal).isfinite()
        if wrong.any():
            raise UserError(
                f"The autoencoder's answer to image {start + int(wrong.nonzero()[0])} is not finite: its training "
                "diverged. Train it again, with a lower optimizer.lr."
            )
        found.append(_Encoded(z_raw, decoder, entropy, standard_normal))
    return _Encoded(*(torch.cat(values) for values in zip(*found, strict=True)))


def vae_bound(autoencoder: Autoencoder, images: Tensor, *, seed: int = 0, batch_size: int = 64) -> Terms:
    """The autoencoder's own bound, with the prior N(0, I) on z_raw that its KL term trains towards.

        -log p(x) <= E_q[-log p(x | z_raw)] + KL(q(z_raw | x) || N(0, I))

    Args:
        images: [n, 3, H, W] in [-1, 1], 8-bit values.

    Raises:
        UserError: an autoencoder without a density, latents that are not finite.
    """
    require_density(autoencoder)
    encoded = _encode_images(autoencoder, images, sample_generators(seed, range(len(images))), batch_size)
    return _standard_normal_prior(encoded, images[0].numel())


def _standard_normal_prior(encoded: _Encoded, num_dims: int) -> Terms:
    parts = {"decoder": encoded.decoder, "encoder": -encoded.entropy, "N(0, I) prior": encoded.standard_normal}
    return Terms(parts, num_dims)


@dataclass(frozen=True)
class TwoStage:
    """What an image costs under three priors of its latent, each with the same draw of z_raw.

    Args:
        chain: The ancestral chain's variational bound.
        vae: The autoencoder alone: N(0, I) on z_raw; None for a chain on pixels.
        ode: The probability-flow ODE's density of z_1 in place of the chain's steps from T to 1; None unless asked for.
        ode_evaluations: Network calls that the ODE took, over all batches.
        ode_probe_variance: Of each image's total, from the choice of Hutchinson's probes alone; None where it cannot
            be known, with one probe or the exact trace.
    """

    chain: Terms
    vae: Terms | None
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
        UserError: what `check_chain` refuses, optimal without its table, an answer of the autoencoder or the
            network that is not finite.
    """
    variance = variance or pipeline.variance
    check_chain(pipeline, variance, steps, ode)
    if variance == "optimal":
        pipeline.require_fitted()
    pipeline.network.eval()
    generators = sample_generators(seed, range(len(images)))
    stage_1 = _pixels if pipeline.autoencoder.is_identity else _latents
    z_0, parts, vae, last = stage_1(pipeline.autoencoder, images, generators, batch_size)
    moved = {name: value.to(pipeline.device) for name, value in condition.items()}
    report = on_progress or (lambda *_: None)
    chain = _chain_bound(
        pipeline,
        z_0.to(pipeline.device),
        moved,
        generators=generators,
        variance=variance,
        steps=steps,
        last=last,
        batch_size=batch_size,
        on_batch=lambda done, total: report("chain", done, total),
    )
    num_dims = images[0].numel()
    of_chain = parts | {"L_T": chain.prior, "sum of L_t-1": chain.layers, "L_0": chain.last}
    terms = Terms(of_chain, num_dims, chain.monte_carlo_variance, chain)
    if ode is None:
        return TwoStage(terms, vae)
    density, evaluations, probe_variance = _ode_prior(pipeline, z_0, moved, seed, batch_size, ode, report)
    of_ode = Terms(parts | {"ODE, z_1": density, "L_0": chain.last}, num_dims)
    return TwoStage(terms, vae, of_ode, evaluations, probe_variance)


def _chain_bound(pipeline: LatentDiffusionPipeline, z_0: Tensor, condition: Condition, **options: Any) -> Bound:
    try:
        return variational_bound(pipeline.denoiser(), z_0, condition, z_0_mse=pipeline.z_0_mse, **options)
    except NotFiniteError as error:
        raise UserError(
            f"The bound cannot be computed: {error}. A network that answers so diverged in training: train it again, "
            "with a lower optimizer.lr."
        ) from error


StageOne = tuple[Tensor, dict[str, Tensor], Terms | None, LastTerm | None]
"""z_0, the first stage's own terms, its bound without a chain, and L_0 where that is no density."""


def _latents(autoencoder: Autoencoder, images: Tensor, generators: list[torch.Generator], batch_size: int) -> StageOne:
    encoded = _encode_images(autoencoder, images, generators, batch_size)
    z_0 = autoencoder.standardise(encoded.z_raw)
    latent_std = torch.tensor(require_density(autoencoder).latent_std, dtype=torch.float64)
    volume = z_0[0, 0].numel() * latent_std.log().sum()
    parts = {"decoder": encoded.decoder, "encoder": -encoded.entropy, "volume": volume.expand(len(images))}
    return z_0, parts, _standard_normal_prior(encoded, images[0].numel()), None


def _pixels(autoencoder: Autoencoder, images: Tensor, generators: list[torch.Generator], batch_size: int) -> StageOne:
    """A chain on pixels has no first stage, and its L_0 is the mass of an 8-bit value: bits of discrete images."""

    def last(image: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        mean, std = (autoencoder.unstandardise(value.cpu().double()) for value in (mean, std))
        std = std - autoencoder.unstandardise(torch.zeros_like(std))  # a scale has no mean to add
        return discretised_nll(images[image].double(), mean, std, BIN, low=-1.0, high=1.0).flatten(1).sum(1)

    return autoencoder.standardise(images), {}, None, last


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

    With L_0 it bounds -log p(z_0) where z_1 comes from the ODE and z_0 from z_1 by the chain's last step. The entropy
    of q(z_1 | z_0) is exact. z_1 and the probes come from generators of their own, so that the chain's numbers do not
    depend on whether the ODE's were asked for.
    """
    schedule, n = pipeline.schedule, len(z_0)
    generators = [torch_generator(seed, 4, i) for i in range(n)]
    eps = torch.stack([torch.randn(z_0.shape[1:], generator=own) for own in generators])
    z_1 = marginal(schedule, z_0, 1, eps)
    entropy = 0.5 * z_0[0].numel() * (LOG_2PI_E + math.log(1 - schedule.alpha_bar[1].item()))
    densities, variances, evaluations = [], [], 0
    for start in range(0, n, batch_size):
        report("ODE", start, n)
        stop = min(start + batch_size, n)
        part = {name: value[start:stop] for name, value in condition.items()}
        try:
            found = ode_log_likelihood(
                pipeline.denoiser(),
                z_1[start:stop].to(pipeline.device),
                part,
                generators=generators[start:stop],
                **options,
            )
        except ArithmeticError as error:
            raise UserError(
                f"The ODE has no density for images {start} to {stop - 1}: {error}. Choose a larger rtol=, or leave "
                "ode= out."
            ) from error
        densities.append(-found.log_likelihood.cpu().double() - entropy)
        evaluations += found.evaluations
        if found.probe_variance is not None:
            variances.append(found.probe_variance.cpu().double() / options["probes"])
    report("ODE", n, n)
    return torch.cat(densities), evaluations, torch.cat(variances) if variances else None
