"""DDIM, from deterministic (eta = 0) to ancestral (eta = 1) (Song et al. 2021, arXiv:2010.02502)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.chain import check_order, to_eps
from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.samplers.base import ChainSampler, Generators, SamplingRun, Transition, draw_noise
from ldm.diffusion.schedule import NoiseSchedule
from ldm.rules import Fraction, checked


@checked
def ddim_step(
    schedule: NoiseSchedule,
    z_0: Float[Tensor, " b *z"],
    z_t: Float[Tensor, " b *z"],
    *,
    s: int,
    t: int,
    eta: Fraction = 0.0,
    generator: Generators = None,
) -> Float[Tensor, " b *z"]:
    """Take a DDIM step from z_t down to z_s, given the predicted clean latent z_0.

        z_s = sqrt(a_s) z_0 + sqrt(1 - a_s - v) eps + sqrt(v) n,   n ~ N(0, I)
        v   = eta^2 (1 - a_s) / (1 - a_t) (1 - a_t / a_s)

    eta = 0 is deterministic; eta = 1 samples from the posterior q(z_s | z_t, z_0).
    Source: Song et al. 2021, arXiv:2010.02502, eqs. 12 and 16.

    Raises:
        ValueError: if 0 <= s < t <= T or 0 <= eta <= 1 does not hold.
    """
    check_order(schedule, s, t)
    eps = to_eps(schedule, z_0, z_t, t)
    a_s, a_t = schedule.at(s, eps), schedule.at(t, eps)
    v = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    # If a_t is near 0 and eta = 1, v = 1 - a_s up to rounding, so the difference can be slightly negative.
    eps_scale = (1 - a_s - v).clamp(min=0).sqrt()
    z_s = a_s.sqrt().to(eps) * z_0 + eps_scale.to(eps) * eps
    if eta == 0 or s == 0:
        return z_s
    return z_s + v.sqrt().to(eps) * draw_noise(eps, generator)


@dataclass(frozen=True)
class DDIM(ChainSampler):
    """DDIM sampler.

    >>> import torch
    >>> from ldm import DDIM, Denoiser, cosine
    >>> denoiser = Denoiser(cosine(1000), lambda z_t, timestep, condition: 0 * z_t + 1, prediction="z_0")
    >>> z_0 = DDIM(steps=10)(denoiser, torch.randn(2, 4, 8, 8))
    >>> z_0.min().item(), z_0.max().item()
    (1.0, 1.0)

    Args:
        eta: amount of noise, from 0 (deterministic) to 1 (ancestral).
    """

    method: ClassVar[str] = "ddim"
    eta: Fraction = 0.0

    def _transition(self, run: SamplingRun) -> Transition:
        def transition(prediction: Prediction, z_t: Tensor, s: int, t: int) -> Tensor:
            return ddim_step(run.schedule, prediction.z_0, z_t, s=s, t=t, eta=self.eta, generator=run.generator)

        return transition
