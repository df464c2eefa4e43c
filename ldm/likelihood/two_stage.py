"""The two-stage variational bound on the likelihood of an image.

    -log p(x) <= E_q[ -log p(x | z_raw) + log q(z_raw | x) + L_VLB(z) ] + h w sum_c log std_c

in nats, summed over the dimensions of 8-bit images x. The diffusion chain is defined on the standardised latent
z = (z_raw - mean) / std, and the last term accounts for this change of variables. p(x | z_raw) is a Gaussian around the
decoded image, integrated over the bin of each 8-bit value. It has one scale per colour channel, fitted on the training
split. For conditional models, the bound is on -log p(x | condition), given the caption or class of each image, without
guidance.
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
from ldm.sampling.pipeline import LatentDiffusion

BIN_WIDTH = 2 / 255
"""Width of the bin of an 8-bit value in images scaled to [-1, 1]."""

LOG_2PI_E = math.log(2 * math.pi) + 1
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Terms:
    """Terms of a bound on -log p(x) for n images, in nats.

    Args:
        parts: Terms by name, each of shape [n], in the order of the report's table.
        num_dims: Number of dimensions of an image, 3 H W.
        monte_carlo_variance: Variance of each image's total due to the random t and noise of the chain, [n]; None
            without a chain.
        chain: Bound of the diffusion chain; None without a chain.
    """

    parts: dict[str, Tensor]
    num_dims: int
    monte_carlo_variance: Tensor | None = None
    chain: Bound | None = field(default=None, repr=False)

    @property
    def total(self) -> Tensor:
        """Sum of the terms, [n]."""
        return torch.stack(list(self.parts.values())).sum(0)

    def bits_per_dim(self, nats: Tensor) -> Tensor:
        """Convert nats per image to bits per dimension. Each colour value of each pixel is one dimension."""
        return nats / (self.num_dims * math.log(2))

    def metrics(self) -> dict[str, Metric]:
        """Return the mean of each term and of the total over the images, in bits/dim, with standard errors.

        The standard errors account for the random selection of images.
        """
        return {name: mean_metric(self.bits_per_dim(x)) for name, x in {**self.parts, "total": self.total}.items()}

    @property
    def monte_carlo_error(self) -> float | None:
        """Standard error of the mean total due to the random t and noise, given the images and latents, in bits/dim."""
        if self.monte_carlo_variance is None:
            return None
        return self.bits_per_dim(self.monte_carlo_variance.sum().sqrt() / len(self.total)).item()


def draw_latents(
    autoencoder: Autoencoder, images: Tensor, generators: list[torch.Generator]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean and log-variance of q(z_raw | x), and one sample of z_raw per image from its own generator."""
    mean, log_variance = (at_least_float32(moment).cpu() for moment in autoencoder.encode(images))
    noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in generators])
    return mean, log_variance, mean + (0.5 * log_variance).exp() * noise


class _Encoded(NamedTuple):
    """One sample z_raw ~ q(z_raw | x) for each image, and the first-stage terms of the bound.

    `decoder` is -log p(x | z_raw). `entropy` is the exact entropy of q(z_raw | x), and `standard_normal` is the exact
    expectation of -log N(z_raw; 0, I).
    """

    z_raw: Tensor
    decoder: Tensor
    entropy: Tensor
    standard_normal: Tensor


def _encode_images(
    autoencoder: Autoencoder, images: Tensor, generators: list[torch.Generator], batch_size: int
) -> _Encoded:
    scale = torch.tensor(require_density(autoencoder).decoder_scale, dtype=torch.float64)[:, None, None]
    encoded: list[_Encoded] = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        mean, log_variance, z_raw = draw_latents(autoencoder, batch, generators[start : start + len(batch)])
        decoded = autoencoder.decode(z_raw).cpu().double()
        decoder = discretised_nll(batch.double(), decoded, scale, BIN_WIDTH, low=-1.0, high=1.0).flatten(1).sum(1)
        mean, log_variance = mean.double(), log_variance.double()
        entropy = 0.5 * (LOG_2PI_E + log_variance).flatten(1).sum(1)
        standard_normal = 0.5 * (mean.square() + log_variance.exp() + LOG_2PI_E - 1).flatten(1).sum(1)
        is_bad = ~(decoder + entropy + standard_normal).isfinite()
        if is_bad.any():
            raise UserError(
                f"The autoencoder's output for image {start + int(is_bad.nonzero()[0])} is not finite, probably "
                "because its training diverged. Retrain the autoencoder with a lower optimizer.lr."
            )
        encoded.append(_Encoded(z_raw, decoder, entropy, standard_normal))
    return _Encoded(*(torch.cat(values) for values in zip(*encoded, strict=True)))


def vae_bound(autoencoder: Autoencoder, images: Tensor, *, seed: int = 0, batch_size: int = 64) -> Terms:
    """Return the bound for the autoencoder alone, with the prior N(0, I) on z_raw from the autoencoder's KL term.

        -log p(x) <= E_q[-log p(x | z_raw)] + KL(q(z_raw | x) || N(0, I))

    Args:
        images: 8-bit images scaled to [-1, 1], [n, 3, H, W].

    Raises:
        UserError: if the autoencoder has no density or returns non-finite values.
    """
    require_density(autoencoder)
    encoded = _encode_images(autoencoder, images, sample_generators(seed, range(len(images))), batch_size)
    return _standard_normal_prior(encoded, images[0].numel())


def _standard_normal_prior(encoded: _Encoded, num_dims: int) -> Terms:
    parts = {"decoder": encoded.decoder, "encoder": -encoded.entropy, "N(0, I) prior": encoded.standard_normal}
    return Terms(parts, num_dims)


@dataclass(frozen=True)
class TwoStageBounds:
    """Bounds under three priors on the latent, all computed for the same samples of z_raw.

    Args:
        chain: Bound with the ancestral chain as prior.
        vae: Bound with the prior N(0, I) on z_raw, without a diffusion model; None for a chain on pixels.
        ode: Bound with the density of z_1 under the probability-flow ODE in place of the chain's steps from T to 1;
            None if not requested.
        num_ode_evaluations: Number of network evaluations by the ODE solver, summed over all batches.
        ode_probe_variance: Variance of each image's total due to the Hutchinson probes, [n]. None with a single probe
            or with the exact trace.
    """

    chain: Terms
    vae: Terms | None
    ode: Terms | None = None
    num_ode_evaluations: int = 0
    ode_probe_variance: Tensor | None = None


def two_stage_bound(
    pipeline: LatentDiffusion,
    images: Tensor,
    condition: Condition,
    *,
    seed: int = 0,
    variance: str | None = None,
    steps: int | None = None,
    batch_size: int = 64,
    ode: dict[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> TwoStageBounds:
    """Return the bound for each image, term by term. The random numbers for image i depend only on the seed and i.

    Args:
        images: 8-bit images scaled to [-1, 1], [n, 3, H, W].
        condition: Batch-first tensors for the n images; {} without conditioning.
        variance: Choice of Sigma for the reverse steps; None for the model's default.
        steps: Number of chain terms per image, stratified over t; None for all T.
        ode: Options of `ode_log_likelihood` (rtol, atol, probes) for the ODE bound; None to skip this bound.
        on_progress: Called as on_progress(task, completed, total).

    Raises:
        UserError: see `check_chain`; also if the optimal Sigma is chosen but has not been fitted, or if the autoencoder
            or the network returns non-finite values.
    """
    variance = variance or pipeline.variance
    check_chain(pipeline, variance, steps, ode)
    if variance == "optimal":
        pipeline.check_optimal_variance()
    pipeline.network.eval()
    generators = sample_generators(seed, range(len(images)))
    first_stage = _run_first_stage_on_pixels if pipeline.autoencoder.is_identity else _run_first_stage_on_latents
    z_0, parts, vae, last_term = first_stage(pipeline.autoencoder, images, generators, batch_size)
    condition = {name: value.to(pipeline.device) for name, value in condition.items()}
    report_progress = on_progress or (lambda *_: None)
    chain = _chain_bound(
        pipeline,
        z_0.to(pipeline.device),
        condition,
        generators=generators,
        variance=variance,
        steps=steps,
        last_term=last_term,
        batch_size=batch_size,
        on_batch=lambda completed, total: report_progress("chain", completed, total),
    )
    num_dims = images[0].numel()
    chain_parts = parts | {"L_T": chain.prior, "sum of L_t-1": chain.layers, "L_0": chain.last_term}
    chain_terms = Terms(chain_parts, num_dims, chain.monte_carlo_variance, chain)
    if ode is None:
        return TwoStageBounds(chain_terms, vae)
    density, num_evaluations, probe_variance = _ode_prior(
        pipeline, z_0, condition, seed, batch_size, ode, report_progress
    )
    ode_terms = Terms(parts | {"ODE, z_1": density, "L_0": chain.last_term}, num_dims)
    return TwoStageBounds(chain_terms, vae, ode_terms, num_evaluations, probe_variance)


def _chain_bound(pipeline: LatentDiffusion, z_0: Tensor, condition: Condition, **options: Any) -> Bound:
    try:
        return variational_bound(pipeline.denoiser(), z_0, condition, z_0_mse=pipeline.z_0_mse, **options)
    except NotFiniteError as error:
        raise UserError(
            f"The bound cannot be computed: {error}. The network's training probably diverged. Retrain the network "
            "with a lower optimizer.lr."
        ) from error


FirstStage = tuple[Tensor, dict[str, Tensor], Terms | None, LastTerm | None]
"""z_0, the terms of the first stage, the bound without a chain and, on pixels, the function that computes L_0."""


def _run_first_stage_on_latents(
    autoencoder: Autoencoder, images: Tensor, generators: list[torch.Generator], batch_size: int
) -> FirstStage:
    """Return the first stage of a chain on latents, whose L_0 is the negative log-density of a Gaussian."""
    encoded = _encode_images(autoencoder, images, generators, batch_size)
    z_0 = autoencoder.standardise(encoded.z_raw)
    latent_std = torch.tensor(require_density(autoencoder).latent_std, dtype=torch.float64)
    volume = z_0[0, 0].numel() * latent_std.log().sum()
    parts = {"decoder": encoded.decoder, "encoder": -encoded.entropy, "volume": volume.expand(len(images))}
    return z_0, parts, _standard_normal_prior(encoded, images[0].numel()), None


def _run_first_stage_on_pixels(
    autoencoder: Autoencoder, images: Tensor, generators: list[torch.Generator], batch_size: int
) -> FirstStage:
    """Return the first stage of a chain on pixels, whose L_0 is the negative log probability of the 8-bit values."""

    def last_term(index: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        mean, std = (autoencoder.unstandardise(value.cpu().double()) for value in (mean, std))
        std = std - autoencoder.unstandardise(torch.zeros_like(std))  # rescale, but do not shift by the mean
        return discretised_nll(images[index].double(), mean, std, BIN_WIDTH, low=-1.0, high=1.0).flatten(1).sum(1)

    return autoencoder.standardise(images), {}, None, last_term


def _ode_prior(
    pipeline: LatentDiffusion,
    z_0: Tensor,
    condition: Condition,
    seed: int,
    batch_size: int,
    options: dict[str, Any],
    report_progress: OnProgress,
) -> tuple[Tensor, int, Tensor | None]:
    """Return -log p_ODE(z_1) + log q(z_1 | z_0) per image, the number of network evaluations, and the probes' variance.

    The first of these replaces L_T and the sum of L_t-1. Adding L_0 gives a bound on -log p(z_0) for the model that
    samples z_1 with the ODE and z_0 with the last step of the chain. The entropy of q(z_1 | z_0) is exact. z_1 and the
    probes use separate generators, so the random numbers of the chain are the same with and without the ODE.
    """
    schedule, n = pipeline.schedule, len(z_0)
    generators = [torch_generator(seed, 4, i) for i in range(n)]
    eps = torch.stack([torch.randn(z_0.shape[1:], generator=generator) for generator in generators])
    z_1 = marginal(schedule, z_0, 1, eps)
    entropy = 0.5 * z_0[0].numel() * (LOG_2PI_E + math.log(1 - schedule.alpha_bar[1].item()))
    densities, variances, num_evaluations = [], [], 0
    for start in range(0, n, batch_size):
        report_progress("ODE", start, n)
        stop = min(start + batch_size, n)
        condition_rows = {name: value[start:stop] for name, value in condition.items()}
        try:
            result = ode_log_likelihood(
                pipeline.denoiser(),
                z_1[start:stop].to(pipeline.device),
                condition_rows,
                generators=generators[start:stop],
                **options,
            )
        except ArithmeticError as error:
            raise UserError(
                f"The likelihood under the ODE cannot be computed for images {start} to {stop - 1}: {error}. Choose "
                "a larger rtol=, or remove ode=."
            ) from error
        densities.append(-result.log_likelihood.cpu().double() - entropy)
        num_evaluations += result.num_evaluations
        if result.probe_variance is not None:
            variances.append(result.probe_variance.cpu().double() / options["probes"])
    report_progress("ODE", n, n)
    return torch.cat(densities), num_evaluations, torch.cat(variances) if variances else None
