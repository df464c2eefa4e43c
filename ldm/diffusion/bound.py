"""The variational bound on -log p(z_0), in nats per image, term by term.

The reverse chain is a hierarchical VAE with T layers of latents and a fixed encoder q. Its bound is

    -log p(z_0) <= L_T + sum_{t=2}^T L_{t-1} + L_0
    L_T     = KL(q(z_T | z_0) || N(0, I))
    L_{t-1} = KL(q(z_{t-1} | z_t, z_0) || p(z_{t-1} | z_t))     one layer of the VAE
    L_0     = -log p(z_0 | z_1)                                 a continuous Gaussian density, so it can be negative

with p(z_s | z_t) = N(mean of q(z_s | z_t, the predicted z_0), Sigma(s, t, v) I). All terms are summed over
the dimensions of an image, in float64 (float32 on MPS, which has no float64).
Source: Ho et al. 2020, arXiv:2006.11239, eq. 5.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from ldm.diffusion.bound_terms import bound_term, prior_kl, to_float64
from ldm.diffusion.chain import at_least_float32, check_z_0_mse, log_variance, marginal
from ldm.diffusion.denoiser import Condition, DenoiserLike, Prediction
from ldm.diffusion.samplers.base import check_generators
from ldm.diffusion.schedule import NoiseSchedule

OnBatch = Callable[[int, int], None]
"""Progress callback, called as on_batch(completed, total) with the numbers of completed and total predictions."""


class NotFiniteError(ValueError):
    """Raised when a latent or the denoiser's output is not finite."""


LastTerm = Callable[[Int[Tensor, " k"], Tensor, Tensor], Tensor]
"""Function that computes L_0: last(image, mean, std) returns nats [k] for the images with indices `image` [k].

mean and std are those of p(z_0 | z_1) = N(mean, std^2).
"""


@dataclass(frozen=True, eq=False)
class Bound:
    """The variational bound of b images, in nats per image, on the CPU in float64.

    Args:
        prior: L_T, [b].
        layers: sum_{t=2}^T L_{t-1}, [b].
        last: L_0, [b].
        monte_carlo_variance: estimated variance of each image's total over draws of t and noise, [b].
        steps: t at each point of the curve, [k]: 1..T, or the middle of each stratum.
        widths: number of values of t that each point represents, [k].
        curve: mean of L_{t-1} over images and over the values of t that each point represents, [k];
            sum(widths curve) is the mean of layers + last.
    """

    prior: Float64[Tensor, " b"]
    layers: Float64[Tensor, " b"]
    last: Float64[Tensor, " b"]
    monte_carlo_variance: Float64[Tensor, " b"]
    steps: Float64[Tensor, " k"]
    widths: Float64[Tensor, " k"]
    curve: Float64[Tensor, " k"]

    @property
    def total(self) -> Float64[Tensor, " b"]:
        """The bound for each image: prior + layers + last."""
        return self.prior + self.layers + self.last

    @property
    def standard_error(self) -> float:
        """Standard error of the mean total over images, Monte Carlo noise included; nan for a single image."""
        return self.total.std().item() / len(self.total) ** 0.5 if len(self.total) > 1 else math.nan

    @property
    def monte_carlo_error(self) -> float:
        """Standard deviation of the mean total over draws of t and noise, with the images fixed."""
        return self.monte_carlo_variance.sum().sqrt().item() / len(self.total)


@torch.no_grad()
def variational_bound(
    denoiser: DenoiserLike,
    z_0: Float[Tensor, " b *z"],
    condition: Condition | None = None,
    *,
    generators: list[torch.Generator],
    variance: str,
    z_0_mse: Float64[Tensor, " num_entries"] | None = None,
    steps: int | None = None,
    last: LastTerm | None = None,
    batch_size: int = 64,
    on_batch: OnBatch | None = None,
) -> Bound:
    """Return an unbiased estimate of the bound on -log p(z_0) for each image.

    With steps=None, every t is visited once. Otherwise `steps` terms per image are evaluated at random t: the chain is
    divided into steps / 2 strata of consecutive t, each with two uniform draws, weighted by its width w. The first
    stratum contains only t = 1. The remaining strata divide log(1 + snr) equally, but are at least one step wide. For
    data N(0, I), mse(t) = 1 / (1 + snr), so each of them contributes the same amount to the bound.

    If all t are visited, each of T / 32 strata (at least 8) gets one more prediction, with fresh noise at a random t
    in the stratum. This prediction is only used to estimate the Monte Carlo variance; see `_layers`.

    Each image uses its own generator in a fixed order, so its result depends neither on the other images nor on
    batch_size.

    Args:
        generators: one per image, on the CPU.
        variance: the choice of Sigma; see `log_variance`.
        z_0_mse: the table required by variance optimal; see `fit_z_0_mse`.
        steps: number of terms per image, an even number from 4 to T; None visits all t.
        last: computes L_0 of discrete data, such as the 8-bit values of a chain on pixels; None uses the Gaussian
            density.
        batch_size: number of predictions per batch; images and steps are batched together.
        on_batch: called after each batch.

    Raises:
        ValueError: unless there is one generator per image and `steps` is valid; as raised by `log_variance`.
        NotFiniteError: if z_0 or a term is not finite, naming the image and t.
    """
    z_0, schedule = at_least_float32(z_0), denoiser.schedule
    T, b = schedule.num_steps, len(z_0)
    check_generators(generators, b)
    if steps is not None and (steps % 2 or not 4 <= steps <= T):
        raise ValueError(f"steps must be an even number from 4 to T = {T}, or None to visit all t; got {steps}")
    _check_finite(z_0)
    edges = _strata(schedule, min(T, max(8, T // 32)) if steps is None else steps // 2)
    t = torch.arange(1, T + 1)[:, None].expand(T, b) if steps is None else _draw_steps(edges, generators)
    t = torch.cat([t, _draw_steps(edges, generators)])
    image, flat_t = torch.arange(b).repeat(len(t)), t.flatten()
    batches = _predict(denoiser, z_0, condition, image, flat_t, generators, batch_size, on_batch)
    terms = _terms(schedule, batches, image, flat_t, variance, z_0_mse, last).reshape(t.shape)
    layers, variances, midpoints, widths = _layers(terms, t, edges, T)
    return Bound(
        prior=prior_kl(schedule, z_0).cpu().double(),
        layers=layers[1:].sum(0),
        last=layers[0],
        monte_carlo_variance=variances.sum(0),
        steps=midpoints,
        widths=widths,
        curve=layers.mean(1) / widths,
    )


@torch.no_grad()
def fit_z_0_mse(
    denoiser: DenoiserLike,
    z_0: Float[Tensor, " n *z"],
    condition: Condition | None = None,
    *,
    generator: torch.Generator,
    images_per_step: int = 16,
    batch_size: int = 64,
    on_batch: OnBatch | None = None,
) -> Float64[Tensor, " num_entries"]:
    """Estimate the denoiser's error mse(t) = E |z_0 - predicted z_0|^2 / D for t = 0..T.

    Variance optimal requires this table. Fit it on latents of the training split: with a table fitted on the evaluated
    images, the result would not be a bound. Each t is visited images_per_step times, cycling through the images in
    random order.

    A relative error e of mse(t) increases the term at t by at most D e^2 / 4 nats per image. Only L_0 can reach this
    maximum. In the other terms, mse(t) contributes only the fraction c_0^2 mse / Sigma of Sigma, and the increase is
    proportional to the square of this fraction.

    Raises:
        ValueError: if images_per_step is not positive; if the denoiser's error is exactly 0 at some t.
        NotFiniteError: if z_0 or an error is not finite.
    """
    if images_per_step < 1:
        raise ValueError(f"images_per_step must be at least 1; got {images_per_step}")
    z_0, num_steps = at_least_float32(z_0), denoiser.schedule.num_steps
    _check_finite(z_0)
    t = torch.arange(1, num_steps + 1).repeat_interleave(images_per_step)
    rounds = math.ceil(len(t) / len(z_0))
    order = [torch.randperm(len(z_0), generator=generator, device=generator.device) for _ in range(rounds)]
    image = torch.cat(order)[: len(t)].cpu()
    table, generators = torch.zeros(num_steps + 1, dtype=torch.float64), [generator] * len(z_0)
    for rows, clean, prediction in _predict(denoiser, z_0, condition, image, t, generators, batch_size, on_batch):
        error = (to_float64(prediction.z_0) - to_float64(clean)).square().flatten(1).mean(1).cpu().double()
        _check_finite_at(error, "the squared error", image[rows], t[rows])
        table.index_add_(0, t[rows], error / images_per_step)
    check_z_0_mse(denoiser.schedule, table)
    return table


def _terms(
    schedule: NoiseSchedule,
    batches: Iterator[tuple[slice, Tensor, Prediction]],
    image: Int[Tensor, " n"],
    t: Int[Tensor, " n"],
    variance: str,
    z_0_mse: Tensor | None,
    last: LastTerm | None,
) -> Float64[Tensor, " n"]:
    """Return L_{t-1} of image[k] at t[k] for each k; `last` computes the terms at t = 1, unless it is None."""
    terms = torch.empty(len(t), dtype=torch.float64)
    for rows, clean, prediction in batches:
        term = bound_term(schedule, prediction, clean, t[rows] - 1, t[rows], variance=variance, z_0_mse=z_0_mse)
        if last is not None and (is_last_term := t[rows] == 1).any():
            mean, v = prediction.z_0[is_last_term], None if prediction.v is None else prediction.v[is_last_term]
            log_sigma = log_variance(schedule, 0, 1, variance, like=mean, v=v, z_0_mse=z_0_mse)
            term[is_last_term] = last(image[rows][is_last_term], mean, (0.5 * log_sigma).exp()).to(term)
        terms[rows] = term.cpu().double()
        _check_finite_at(terms[rows], "the bound", image[rows], t[rows])
    return terms


def _layers(
    terms: Float64[Tensor, " n b"], t: Int[Tensor, " n b"], edges: Int[Tensor, " edges"], T: int
) -> tuple[Float64[Tensor, " k b"], Float64[Tensor, " strata b"], Float64[Tensor, " k"], Float64[Tensor, " k"]]:
    """Return each curve point's contribution, the Monte Carlo variance by stratum, and each point's t and width.

    The variance estimates are unbiased: w^2 (x - x')^2 / 4 for the two terms of a stratum or, if all t were visited,
    w (x - x')^2 / 2 for a term and its repetition with fresh noise at the same t. A term at a neighbouring t could not
    replace the repetition: where L_{t-1} falls steeply, the difference between neighbours is proportional to the number
    of dimensions, but noise only to its square root.
    """
    stratum_widths = edges.diff().double()
    if len(t) > T:
        layers = terms[:T]
        variances = stratum_widths[:, None] * (layers.gather(0, t[T:] - 1) - terms[T:]).square() / 2
        return layers, variances, t[:T, 0].double(), torch.ones(T, dtype=torch.float64)
    term_1, term_2 = stratum_widths[:, None] * terms.reshape(2, -1, terms.shape[1])
    midpoints = (edges[1:] + edges[:-1] + 1).double() / 2
    return (term_1 + term_2) / 2, (term_1 - term_2).square() / 4, midpoints, stratum_widths


def _strata(schedule: NoiseSchedule, count: int) -> Int[Tensor, " edges"]:
    """Return the edges 0, 1, ..., T of `count` strata, where stratum i contains t = edges[i] + 1..edges[i + 1].

    `count` is 2..T, or 1 if T = 1.
    """
    log_1_snr = -torch.log1p(-schedule.alpha_bar[1:].cpu())
    levels = torch.linspace(log_1_snr[0].item(), log_1_snr[-1].item(), count, dtype=torch.float64)
    lowest = torch.arange(1, count + 1)
    edges = 1 + torch.searchsorted(-log_1_snr, -levels).clamp(max=schedule.num_steps - 1)
    edges = (edges - lowest).cummax(0).values + lowest
    return torch.cat([torch.zeros(1, dtype=torch.long), edges.minimum(schedule.num_steps - count + lowest)])


def _draw_steps(edges: Int[Tensor, " edges"], generators: list[torch.Generator]) -> Int[Tensor, " strata b"]:
    """Draw a uniform t in each stratum for each image."""
    widths = edges.diff()
    u = [torch.rand(len(widths), generator=g, dtype=torch.float64, device=g.device).cpu() for g in generators]
    return edges[:-1, None] + 1 + (torch.stack(u, 1) * widths[:, None]).long()


def _predict(
    denoiser: DenoiserLike,
    z_0: Tensor,
    condition: Condition | None,
    image: Int[Tensor, " n"],
    t: Int[Tensor, " n"],
    generators: list[torch.Generator],
    batch_size: int,
    on_batch: OnBatch | None,
) -> Iterator[tuple[slice, Tensor, Prediction]]:
    """Add noise to z_0[image[k]] for each k, predict z_0, and yield each batch of k as (rows, z_0, prediction)."""
    for start in range(0, len(t), batch_size):
        rows = slice(start, min(start + batch_size, len(t)))
        eps = torch.stack([_draw(z_0, generators[i]) for i in image[rows].tolist()])
        clean = z_0[image[rows]]
        batch_condition = None if condition is None else {name: value[image[rows]] for name, value in condition.items()}
        z_t = marginal(denoiser.schedule, clean, t[rows], eps.to(z_0.device))
        yield rows, clean, denoiser(z_t, t[rows], batch_condition)
        if on_batch is not None:
            on_batch(rows.stop, len(t))


def _draw(z_0: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(z_0.shape[1:], generator=generator, dtype=z_0.dtype, device=generator.device)


def _check_finite(z_0: Tensor) -> None:
    is_bad = ~z_0.isfinite().flatten(1).all(1)
    if is_bad.any():
        raise NotFiniteError(f"z_0 of image {int(is_bad.nonzero()[0])} is not finite")


def _check_finite_at(values: Tensor, name: str, image: Tensor, t: Tensor) -> None:
    is_bad = ~values.isfinite()
    if is_bad.any():
        k = int(is_bad.nonzero()[0])
        raise NotFiniteError(
            f"{name} of image {int(image[k])} at t = {int(t[k])} is {values[k].item()}, because the denoiser's "
            "output is not finite or Sigma is zero"
        )
