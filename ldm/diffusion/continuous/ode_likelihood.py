"""The likelihood that the probability-flow ODE gives a latent, by the change of variables along its path.

Setting: the ODE of `ldm.diffusion.continuous.ode` carries z at t_min one to one to the noise end. Then, in nats,

    log p(z at t_min) = log N(z_noise; 0, I) + integral of div(dz/dw) dw from t_min to the noise end
    div(dz/dw)        = 1/2 (d log-SNR / dw) alpha (tr J - alpha d),   J = d z_0 / d z

with tr J by Hutchinson's estimator E[v J v], v of independent signs, or exactly in few dimensions.
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
    """log p(z at t_min) per sample, and the cost of computing it.

    Args:
        log_likelihood: in nats, summed over the dimensions and averaged over the probes, [b] in float64.
        evaluations: calls of the denoiser, each followed by one vector-Jacobian product per probe.
        probe_variance: variance of a single probe's estimate, [b] in nats^2. Divide by the number of probes for
            the variance of the mean. None for one probe and for the exact trace.
    """

    log_likelihood: Float64[Tensor, " b"]
    evaluations: int
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

    This density differs from that of the ancestral chain, and can be above or below the chain's bound. One
    adaptive solve integrates z together with the log-density of every probe. The batch shares its steps, so a
    sample's result depends on the other samples, within the tolerance. Memory is that of one forward and one
    backward pass of the denoiser. The network must be in eval mode, so that the ODE is the same at every
    evaluation; its parameters need no gradient.
    Source: Grathwohl et al. 2019, arXiv:1810.01367; Song et al. 2021, arXiv:2011.13456, eqs. 39 and 40.

    Args:
        z: latents with the noise of t_min, such as draws from q(z_t | z_0) there.
        rtol, atol: relative and absolute error tolerance per solver step.
        probes: number of Hutchinson probes, held fixed during the solve. None computes the exact trace, with
            one vector-Jacobian product per dimension.
        generators: random generators for the probes: one for the whole batch, or a list with one per sample, so
            that each sample's probes depend only on its own generator.
        on_evaluation: called as on_evaluation(t) before every call of the denoiser.

    Raises:
        ValueError: as `clock_ends` and `integrate` do; if probes is less than 1; if a list of generators does
            not have one per sample.
        ArithmeticError: as `integrate` does.
    """
    if probes is not None and probes < 1:
        raise ValueError(f"probes must be at least 1, or None for the exact trace; got {probes}")
    check_generators(generators, len(z))
    schedule = denoiser.schedule
    noise_end, data_end = clock_ends(schedule, t_min)
    z = at_least_float32(z)
    batch, dimensions = len(z), z[0].numel()
    signs = None if probes is None else _signs(z, probes, generators)

    def derivative(w: float, state: np.ndarray) -> np.ndarray:
        t, elapsed = clock_elapsed(schedule, w)
        if on_evaluation is not None:
            on_evaluation(t)
        z_t = torch.tensor(state[: z.numel()], dtype=z.dtype, device=z.device).reshape(z.shape)
        parts = _velocity_and_divergence(denoiser, z_t, t, elapsed, condition, signs)
        return np.concatenate([part.flatten().cpu().double().numpy() for part in parts])

    columns = 1 if probes is None else probes
    start = np.concatenate([z.detach().flatten().cpu().double().numpy(), np.zeros(batch * columns)])
    state, evaluations = integrate(derivative, start, data_end, noise_end, rtol=rtol, atol=atol)
    noise, change = np.split(state, [z.numel()])
    prior = -0.5 * (noise.reshape(batch, -1) ** 2).sum(1) - dimensions / 2 * np.log(2 * np.pi)
    estimates = torch.from_numpy(prior[:, None] + change.reshape(batch, columns))
    return ODELikelihood(estimates.mean(1), evaluations, estimates.var(1) if columns > 1 else None)


def _velocity_and_divergence(
    denoiser: DenoiserLike, z_t: Tensor, t: float, elapsed: float, condition: Condition | None, signs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return dz/dw, [b, *z], and its divergence in float64: per probe, [b, probes], or exact, [b, 1]."""
    schedule = denoiser.schedule
    with torch.enable_grad():
        z_t.requires_grad_()
        z_0 = denoiser(z_t, t, condition).z_0
        traces = _trace(z_0, z_t) if signs is None else _quadratic_forms(z_0, z_t, signs)
    velocity = elapsed * probability_flow(schedule, z_0.detach(), z_t.detach(), t)
    a_t = schedule.at(t, traces).cpu()
    excess = traces.detach().cpu().double() - a_t.sqrt() * z_t[0].numel()
    return velocity, elapsed * -0.5 * a_t.sqrt() / (1 - a_t) * excess


def _signs(like: Tensor, probes: int, generators: Generators) -> Tensor:
    """Draw random signs, +1 or -1, of shape [b, probes, *z], on the generator's device."""

    def draw(batch: int, generator: torch.Generator | None) -> Tensor:
        device = "cpu" if generator is None else generator.device
        shape = (batch, probes, *like.shape[1:])
        return torch.randint(0, 2, shape, generator=generator, device=device).to(like) * 2 - 1

    if isinstance(generators, list):
        return torch.cat([draw(1, own) for own in generators])
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
