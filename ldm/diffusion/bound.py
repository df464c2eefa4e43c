"""The variational bound on -log p(z_0), in nats per image, term by term.

The reverse chain is a hierarchical VAE with T layers of latents and a fixed encoder q. The bound of this VAE is

    -log p(z_0) <= L_T + sum_{t=2}^T L_{t-1} + L_0
    L_T     = KL(q(z_T | z_0) || N(0, I))
    L_{t-1} = KL(q(z_{t-1} | z_t, z_0) || p(z_{t-1} | z_t))     one layer of the VAE
    L_0     = -log p(z_0 | z_1)                                 a continuous Gaussian density, so it can be negative

with p(z_s | z_t) = N(mean of q(z_s | z_t, the predicted z_0), Sigma(s, t, v) I). Every term is summed over
the dimensions of an image and computed in float64 (float32 on MPS, which has no float64).
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
"""Progress callback, called as on_batch(completed, total); both arguments are numbers of predictions."""


class NotFiniteError(ValueError):
    """Raised when a latent, a squared error or a term of the bound is not finite."""


LastTerm = Callable[[Int[Tensor, " k"], Tensor, Tensor], Tensor]
"""Function that computes L_0 for k images: last_term(index, mean, std) returns L_0 in nats, [k].

`index` contains the indices of these images, [k], and p(z_0 | z_1) = N(mean, std^2).
"""


@dataclass(frozen=True, eq=False)
class Bound:
    """The variational bound for b images, in nats per image, in float64 on the CPU.

    Args:
        prior: L_T, [b].
        layers: sum_{t=2}^T L_{t-1}, [b].
        last_term: L_0, [b].
        monte_carlo_variance: estimated variance of each image's total over random draws of t and noise, [b].
        steps: the value of t at each point of `curve`, [k]: 1..T, or the midpoint of each stratum.
        widths: the number of values of t that each point of `curve` represents, [k].
        curve: mean of L_{t-1} over images and over the values of t that each point represents, [k]. The sum of
            widths * curve is the mean of layers + last_term over images.
    """

    prior: Float64[Tensor, " b"]
    layers: Float64[Tensor, " b"]
    last_term: Float64[Tensor, " b"]
    monte_carlo_variance: Float64[Tensor, " b"]
    steps: Float64[Tensor, " k"]
    widths: Float64[Tensor, " k"]
    curve: Float64[Tensor, " k"]

    @property
    def total(self) -> Float64[Tensor, " b"]:
        """The bound for each image: prior + layers + last_term."""
        return self.prior + self.layers + self.last_term

    @property
    def standard_error(self) -> float:
        """Standard error of the mean total over images, including Monte Carlo noise; nan for a single image."""
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
    last_term: LastTerm | None = None,
    batch_size: int = 64,
    on_batch: OnBatch | None = None,
) -> Bound:
    """Return an unbiased estimate of the bound on -log p(z_0) for each image.

    With steps=None, every t is visited once. Otherwise, `steps` terms per image are evaluated at random t. The chain is
    divided into steps / 2 strata of consecutive t. Two values of t are drawn uniformly from each stratum, and their
    terms are weighted by the width w of the stratum. The first stratum contains only t = 1. The remaining strata divide
    the range of log(1 + snr) equally, but each is at least one step wide. For data N(0, I), mse(t) = 1 / (1 + snr), so
    each of the remaining strata contributes the same amount to the bound.

    If all t are visited, the chain is divided into T / 32 strata (at least 8) to estimate the Monte Carlo variance. One
    extra prediction is made in each stratum, at a random t and with fresh noise; see `_combine_terms`.

    Each image draws from its own generator in a fixed order, so the result for an image depends neither on the other
    images nor on batch_size.

    Args:
        generators: one per image, on the CPU.
        variance: the choice of Sigma; see `log_variance`.
        z_0_mse: the table required by variance="optimal"; see `fit_z_0_mse`.
        steps: number of terms per image, an even number from 4 to T; None visits all t.
        last_term: function that computes L_0 for discrete data, such as 8-bit pixel values; None uses the Gaussian
            density.
        batch_size: number of predictions per batch. A batch can mix images and steps.
        on_batch: called after each batch.

    Raises:
        ValueError: unless there is one generator per image and `steps` is valid; also if `log_variance` raises it.
        NotFiniteError: if z_0 or a term is not finite, naming the image and t.
    """
    z_0, schedule = at_least_float32(z_0), denoiser.schedule
    T, b = schedule.num_steps, len(z_0)
    check_generators(generators, b)
    if steps is not None and (steps % 2 or not 4 <= steps <= T):
        raise ValueError(f"steps must be an even number from 4 to T = {T}, or None to visit all t; got {steps}")
    _check_finite(z_0)
    edges = _divide_into_strata(schedule, min(T, max(8, T // 32)) if steps is None else steps // 2)
    t = torch.arange(1, T + 1)[:, None].expand(T, b) if steps is None else _draw_steps(edges, generators)
    t = torch.cat([t, _draw_steps(edges, generators)])
    index, flat_t = torch.arange(b).repeat(len(t)), t.flatten()
    batches = _predict(denoiser, z_0, condition, index, flat_t, generators, batch_size, on_batch)
    terms = _compute_terms(schedule, batches, index, flat_t, variance, z_0_mse, last_term).reshape(t.shape)
    layers, variances, midpoints, widths = _combine_terms(terms, t, edges, T)
    return Bound(
        prior=prior_kl(schedule, z_0).cpu().double(),
        layers=layers[1:].sum(0),
        last_term=layers[0],
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
    """Estimate the denoiser's mean squared error mse(t) = E |z_0 - predicted z_0|^2 / D for t = 0..T.

    D is the number of latent dimensions. The optimal variance requires this table. Fit the table on latents of the
    training split: if it were fitted on the evaluated images, the result would not be a valid bound. At each t,
    images_per_step predictions are made. The images are used in random order, all equally often.

    A relative error e in mse(t) increases the term at t by at most D e^2 / 4 nats per image. Only L_0 can reach this
    maximum. In every other term, mse(t) contributes only c_0^2 mse to Sigma, and the increase is proportional to the
    square of that contribution's share of Sigma, c_0^2 mse / Sigma.

    Raises:
        ValueError: if images_per_step is not positive, or if the denoiser's error is exactly 0 at some t.
        NotFiniteError: if z_0 or an error is not finite.
    """
    if images_per_step < 1:
        raise ValueError(f"images_per_step must be at least 1; got {images_per_step}")
    z_0, num_steps = at_least_float32(z_0), denoiser.schedule.num_steps
    _check_finite(z_0)
    t = torch.arange(1, num_steps + 1).repeat_interleave(images_per_step)
    num_rounds = math.ceil(len(t) / len(z_0))
    order = [torch.randperm(len(z_0), generator=generator, device=generator.device) for _ in range(num_rounds)]
    index = torch.cat(order)[: len(t)].cpu()
    table, generators = torch.zeros(num_steps + 1, dtype=torch.float64), [generator] * len(z_0)
    for rows, clean_z_0, prediction in _predict(denoiser, z_0, condition, index, t, generators, batch_size, on_batch):
        error = (to_float64(prediction.z_0) - to_float64(clean_z_0)).square().flatten(1).mean(1).cpu().double()
        _check_finite_at(error, "the squared error", index[rows], t[rows])
        table.index_add_(0, t[rows], error / images_per_step)
    check_z_0_mse(denoiser.schedule, table)
    return table


def _compute_terms(
    schedule: NoiseSchedule,
    batches: Iterator[tuple[slice, Tensor, Prediction]],
    index: Int[Tensor, " n"],
    t: Int[Tensor, " n"],
    variance: str,
    z_0_mse: Tensor | None,
    last_term: LastTerm | None,
) -> Float64[Tensor, " n"]:
    """Return L_{t-1} for index[k] and t[k], for each k. If set, `last_term` computes the terms at t = 1."""
    terms = torch.empty(len(t), dtype=torch.float64)
    for rows, clean_z_0, prediction in batches:
        term = bound_term(schedule, prediction, clean_z_0, t[rows] - 1, t[rows], variance=variance, z_0_mse=z_0_mse)
        if last_term is not None and (is_last_term := t[rows] == 1).any():
            mean, v = prediction.z_0[is_last_term], None if prediction.v is None else prediction.v[is_last_term]
            log_sigma = log_variance(schedule, 0, 1, variance, like=mean, v=v, z_0_mse=z_0_mse)
            term[is_last_term] = last_term(index[rows][is_last_term], mean, (0.5 * log_sigma).exp()).to(term)
        terms[rows] = term.cpu().double()
        _check_finite_at(terms[rows], "the bound's term", index[rows], t[rows])
    return terms


def _combine_terms(
    terms: Float64[Tensor, " n b"], t: Int[Tensor, " n b"], edges: Int[Tensor, " edges"], T: int
) -> tuple[Float64[Tensor, " k b"], Float64[Tensor, " strata b"], Float64[Tensor, " k"], Float64[Tensor, " k"]]:
    """Return the terms at the points of the curve, the Monte Carlo variance per stratum, and the points' t and widths.

    The variance estimates are unbiased. The variance of a stratum of width w with terms x and x' is estimated as
    w^2 (x - x')^2 / 4. If all t were visited, it is estimated as w (x - x')^2 / 2, where x' repeats the term x with
    fresh noise at the same t. A term at a neighbouring t could not replace this repetition: where L_{t-1} falls
    steeply, the difference between neighbours is proportional to the number of dimensions, whereas the noise is
    proportional to the square root of this number.
    """
    stratum_widths = edges.diff().double()
    if len(t) > T:
        layers = terms[:T]
        variances = stratum_widths[:, None] * (layers.gather(0, t[T:] - 1) - terms[T:]).square() / 2
        return layers, variances, t[:T, 0].double(), torch.ones(T, dtype=torch.float64)
    term_1, term_2 = stratum_widths[:, None] * terms.reshape(2, -1, terms.shape[1])
    midpoints = (edges[1:] + edges[:-1] + 1).double() / 2
    return (term_1 + term_2) / 2, (term_1 - term_2).square() / 4, midpoints, stratum_widths


def _divide_into_strata(schedule: NoiseSchedule, num_strata: int) -> Int[Tensor, " edges"]:
    """Return the edges 0, 1, ..., T of `num_strata` strata, where stratum i contains t = edges[i] + 1..edges[i + 1].

    `num_strata` must be from 2 to T, or 1 if T = 1.
    """
    log_1_snr = -torch.log1p(-schedule.alpha_bar[1:].cpu())
    levels = torch.linspace(log_1_snr[0].item(), log_1_snr[-1].item(), num_strata, dtype=torch.float64)
    min_edges = torch.arange(1, num_strata + 1)
    edges = 1 + torch.searchsorted(-log_1_snr, -levels).clamp(max=schedule.num_steps - 1)
    edges = (edges - min_edges).cummax(0).values + min_edges
    return torch.cat([torch.zeros(1, dtype=torch.long), edges.minimum(schedule.num_steps - num_strata + min_edges)])


def _draw_steps(edges: Int[Tensor, " edges"], generators: list[torch.Generator]) -> Int[Tensor, " strata b"]:
    """Draw a uniform t in each stratum for each image."""
    widths = edges.diff()
    u = [torch.rand(len(widths), generator=g, dtype=torch.float64, device=g.device).cpu() for g in generators]
    return edges[:-1, None] + 1 + (torch.stack(u, 1) * widths[:, None]).long()


def _predict(
    denoiser: DenoiserLike,
    z_0: Tensor,
    condition: Condition | None,
    index: Int[Tensor, " n"],
    t: Int[Tensor, " n"],
    generators: list[torch.Generator],
    batch_size: int,
    on_batch: OnBatch | None,
) -> Iterator[tuple[slice, Tensor, Prediction]]:
    """Add noise to z_0[index[k]], predict z_0, and yield batches of k as (rows, clean z_0, prediction)."""
    for start in range(0, len(t), batch_size):
        rows = slice(start, min(start + batch_size, len(t)))
        eps = torch.stack([_draw_noise(z_0, generators[i]) for i in index[rows].tolist()])
        clean_z_0 = z_0[index[rows]]
        batch_condition = None if condition is None else {name: value[index[rows]] for name, value in condition.items()}
        z_t = marginal(denoiser.schedule, clean_z_0, t[rows], eps.to(z_0.device))
        yield rows, clean_z_0, denoiser(z_t, t[rows], batch_condition)
        if on_batch is not None:
            on_batch(rows.stop, len(t))


def _draw_noise(z_0: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(z_0.shape[1:], generator=generator, dtype=z_0.dtype, device=generator.device)


def _check_finite(z_0: Tensor) -> None:
    is_bad = ~z_0.isfinite().flatten(1).all(1)
    if is_bad.any():
        raise NotFiniteError(f"z_0 of image {int(is_bad.nonzero()[0])} is not finite")


def _check_finite_at(values: Tensor, name: str, index: Tensor, t: Tensor) -> None:
    is_bad = ~values.isfinite()
    if is_bad.any():
        k = int(is_bad.nonzero()[0])
        raise NotFiniteError(
            f"{name} for image {int(index[k])} at t = {int(t[k])} is {values[k].item()}, because the denoiser's "
            "output is not finite or Sigma is zero"
        )
