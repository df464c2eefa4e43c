"""Ancestral sampling of the reverse Markov chain (Ho et al. 2020, arXiv:2006.11239, algorithm 2)."""

from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from jaxtyping import Float, Float64
from torch import Tensor

from ldm.diffusion.chain import VarianceType, check_choice, log_variance, posterior
from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.samplers.base import ChainSampler, Generators, SamplingRun, Transition, draw_noise
from ldm.diffusion.schedule import NoiseSchedule


def ddpm_step(
    schedule: NoiseSchedule,
    z_0: Float[Tensor, " b *z"],
    z_t: Float[Tensor, " b *z"],
    *,
    s: int,
    t: int,
    variance: str = "fixed_small",
    v: Float[Tensor, " b *z"] | None = None,
    z_0_mse: Float64[Tensor, " num_entries"] | None = None,
    generator: Generators = None,
) -> Float[Tensor, " b *z"]:
    """Draw z_s from p(z_s | z_t), given the predicted clean latent z_0.

    >>> import torch
    >>> from ldm import cosine, ddpm_step
    >>> z_t, z_0 = torch.ones(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)
    >>> ddpm_step(cosine(1000), z_0, z_t, s=499, t=500).shape
    torch.Size([1, 4, 8, 8])
    >>> ddpm_step(cosine(1000), z_0, z_t, s=0, t=1).abs().max().item()  # the last step returns the mean: z_0
    0.0

        z_s = mean of q(z_s | z_t, z_0) + sqrt(Sigma(s, t, v)) n,   n ~ N(0, I)

    The step to s = 0 returns the mean, without noise.
    Source: Ho et al. 2020, arXiv:2006.11239, algorithm 2, for any s < t.

    Raises:
        ValueError: if 0 <= s < t <= T does not hold, or if s > 0 and `variance` is unknown or lacks its v or z_0_mse.
    """
    mean, _ = posterior(schedule, z_0, z_t, s, t)
    if s == 0:
        return mean
    std = (0.5 * log_variance(schedule, s, t, variance, like=mean, v=v, z_0_mse=z_0_mse)).exp()
    return mean + std * draw_noise(mean, generator)


@dataclass(frozen=True)
class DDPM(ChainSampler):
    """Ancestral sampler on a strided subset of the steps.

    >>> import torch
    >>> from ldm import DDPM, Denoiser, cosine
    >>> denoiser = Denoiser(cosine(1000), lambda z_t, timestep, condition: 0 * z_t, prediction="z_0")
    >>> DDPM(steps=50)(denoiser, torch.randn(2, 4, 8, 8)).abs().max().item()
    0.0

    Args:
        variance: the choice of Sigma. None uses the `variance` argument of the sampling call. If this is None too, the
            choice is "learned_range" if the denoiser returns v, and "fixed_small" otherwise.
    """

    method: ClassVar[str] = "ddpm"
    variance: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variance is not None:
            check_choice("variance", self.variance, get_args(VarianceType))

    def _transition(self, run: SamplingRun) -> Transition:
        requested = self.variance or run.variance

        def transition(prediction: Prediction, z_t: Tensor, s: int, t: int) -> Tensor:
            z_0, v = prediction
            variance = requested or ("fixed_small" if v is None else "learned_range")
            sigma: dict[str, Any] = {"variance": variance, "v": v, "z_0_mse": run.z_0_mse}
            return ddpm_step(run.schedule, z_0, z_t, s=s, t=t, **sigma, generator=run.generator)

        return transition
