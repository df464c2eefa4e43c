"""The likelihood of a latent under the probability-flow ODE, by the change-of-variables formula.

The ODE of `ldm.diffusion.continuous.ode` is a one-to-one map from z at t_min to z at the noise end. In nats,

    log p(z at t_min) = log N(z_noise; 0, I) + integral of div(dz/dw) dw from t_min to the noise end
    div(dz/dw)        = 1/2 (d log-SNR / dw) alpha (tr J - alpha d),   J = d z_0 / d z

tr J = E[v J v] is either estimated from vectors v of random signs (Hutchinson's estimator) or computed exactly,
which is only feasible in few dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ldm.diffusion.chain import at_least_float32
from ldm.diffusion.continuous.clock import clock_elapsed, clock_ends
from ldm.diffusion.continuous.ode import integrate
from ldm.diffusion.continuous.sde import probability_flow
from ldm.diffusion.denoiser import Condition, DenoiserLike
from ldm.diffusion.samplers.base import Generators, check_generators


@dataclass(frozen=True)
class ODELikelihood:
    """log p(z at t_min) for each sample, and the cost of computing it.

    Args:
        log_likelihood: in nats, summed over dimensions and averaged over probes, [b] in float64.
        num_evaluations: number of denoiser calls, each followed by one vector-Jacobian product per probe.
        probe_variance: variance of the estimate from a single probe, [b] in nats^2. Divide this by the number of probes
            to get the variance of log_likelihood. None for one probe and for the exact trace.
    """

    log_likelihood: Float64[Tensor, " b"]
    num_evaluations: int
    probe_variance: Float64[Tensor, " b"] | None


def ode_log_likelihood(
    denoiser: DenoiserLike,
    z: Float[Tensor, " b *z"],
    condition: Condition | None = None,
    *,
    t_min: int | float = 1.0,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    probes: int | None = 1,
    generators: Generators = None,
    on_evaluation: Callable[[float], None] | None = None,
) -> ODELikelihood:
    """Return the log-density of z at t_min under the probability-flow ODE.

    This density differs from the density of the ancestral chain: its negative logarithm can be above or below the
    variational bound. A single adaptive solve integrates z together with the log-density estimate of every probe. All
    samples in a batch share the step sizes, so each result depends slightly on the rest of the batch, within the
    tolerance. The memory use is that of one forward and one backward pass through the denoiser. The network must be in
    eval mode, so that dropout does not change the ODE between evaluations. The network's parameters do not need to
    require gradients.
    Source: Grathwohl et al. 2019, arXiv:1810.01367; Song et al. 2021, arXiv:2011.13456, eqs. 39 and 40.

    Args:
        z: latents at t_min, such as samples from q(z_t | z_0) at t = t_min.
        rtol, atol: relative and absolute error tolerances per solver step.
        probes: number of Hutchinson probes, which stay fixed during the solve. None computes the exact trace, with
            one vector-Jacobian product per dimension.
        generators: random generator for the probes of the whole batch, or a list with one generator per sample, so that
            the probes of a sample do not depend on the rest of the batch.
        on_evaluation: called as on_evaluation(t) before every call to the denoiser.

    Raises:
        ValueError: if probes is less than 1, if the number of generators in a list differs from the batch size, or as
            raised by `clock_ends` and `integrate`.
        ArithmeticError: as raised by `integrate`.
    """
    if probes is not None and probes < 1:
        raise ValueError(f"probes must be at least 1, or None for the exact trace; got {probes}")
    check_generators(generators, len(z))
    schedule = denoiser.schedule
    noise_end, data_end = clock_ends(schedule, t_min)
    z = at_least_float32(z)
    batch, dimensions = len(z), z[0].numel()
    signs = None if probes is None else _draw_signs(z, probes, generators)

    def derivative(w: float, state: np.ndarray) -> np.ndarray:
        t, elapsed = clock_elapsed(schedule, w)
        if on_evaluation is not None:
            on_evaluation(t)
        z_t = torch.tensor(state[: z.numel()], dtype=z.dtype, device=z.device).reshape(z.shape)
        derivatives = _velocity_and_divergence(denoiser, z_t, t, elapsed, condition, signs)
        return np.concatenate([x.flatten().cpu().double().numpy() for x in derivatives])

    num_estimates = 1 if probes is None else probes
    start = np.concatenate([z.detach().flatten().cpu().double().numpy(), np.zeros(batch * num_estimates)])
    state, num_evaluations = integrate(derivative, start, data_end, noise_end, rtol=rtol, atol=atol)
    noise, log_det = np.split(state, [z.numel()])
    prior = -0.5 * (noise.reshape(batch, -1) ** 2).sum(1) - dimensions / 2 * np.log(2 * np.pi)
    estimates = torch.from_numpy(prior[:, None] + log_det.reshape(batch, num_estimates))
    return ODELikelihood(estimates.mean(1), num_evaluations, estimates.var(1) if num_estimates > 1 else None)


def _velocity_and_divergence(
    denoiser: DenoiserLike, z_t: Tensor, t: float, elapsed: float, condition: Condition | None, signs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return dz/dw, [b, *z], and its divergence in float64: one estimate per probe, [b, probes], or exact, [b, 1]."""
    schedule = denoiser.schedule
    with torch.enable_grad():
        z_t.requires_grad_()
        z_0 = denoiser(z_t, t, condition).z_0
        traces = _trace(z_0, z_t) if signs is None else _quadratic_forms(z_0, z_t, signs)
    velocity = elapsed * probability_flow(schedule, z_0.detach(), z_t.detach(), t)
    a_t = schedule.at(t, traces).cpu()
    trace_difference = traces.detach().cpu().double() - a_t.sqrt() * z_t[0].numel()
    return velocity, elapsed * -0.5 * a_t.sqrt() / (1 - a_t) * trace_difference


def _draw_signs(like: Tensor, probes: int, generators: Generators) -> Tensor:
    """Draw random signs +1 or -1 on the generator's device, as a tensor like `like`, [b, probes, *z]."""

    def draw(batch: int, generator: torch.Generator | None) -> Tensor:
        device = "cpu" if generator is None else generator.device
        shape = (batch, probes, *like.shape[1:])
        return torch.randint(0, 2, shape, generator=generator, device=device).to(like) * 2 - 1

    if isinstance(generators, list):
        return torch.cat([draw(1, g) for g in generators])
    return draw(len(like), generators)


def _quadratic_forms(z_0: Tensor, z_t: Tensor, signs: Tensor) -> Tensor:
    """Return v J v for every probe v, [b, probes]."""
    forms = []
    for i in range(signs.shape[1]):
        v = signs[:, i]
        (product,) = torch.autograd.grad(z_0, z_t, v.to(z_0), retain_graph=i + 1 < signs.shape[1])
        forms.append((product * v).flatten(1).sum(1))
    return torch.stack(forms, 1)


def _trace(z_0: Tensor, z_t: Tensor) -> Tensor:
    """Return tr J, [b, 1], computed one dimension at a time."""
    entries = z_0.flatten(1).sum(0)
    last = len(entries) - 1
    diagonal = [
        torch.autograd.grad(entry, z_t, retain_graph=i < last)[0].flatten(1)[:, i] for i, entry in enumerate(entries)
    ]
    return torch.stack(diagonal, 1).sum(1, keepdim=True)
