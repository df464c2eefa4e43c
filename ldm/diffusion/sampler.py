"""Samplers: from noise z_T down the chain to z_0.

One call for ancestral sampling (DDPM), DDIM, and diffusers' multistep solvers of the probability-flow ODE.
All take any strided subset of the steps, and ask a denoiser for z_0 at each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Float64
from torch import Tensor

from ldm.diffusion.chain import VarianceType, at_least_float32, check_order, log_variance, posterior, to_eps
from ldm.diffusion.denoiser import Condition, DenoiserLike
from ldm.diffusion.schedule import ALPHA_BAR_FLOOR, NoiseSchedule

METHODS = ("ddpm", "ddim", "dpmpp", "unipc")
SPACINGS = ("trailing", "leading", "linspace")

Generators = torch.Generator | list[torch.Generator] | None
"""One generator for the batch, or one per sample: sample i then depends on its own alone."""

OnStep = Callable[[float, Tensor, Tensor], None]
"""Called as on_step(s, z_s, z_0) after every transition, with where it arrived and a predicted z_0."""


class SamplerLike(Protocol):
    """Any way from z_T ~ N(0, I) to z_0: down the chain, or along its SDE or ODE."""

    @property
    def method(self) -> str: ...

    @property
    def steps(self) -> int: ...

    def check(self, schedule: NoiseSchedule) -> None: ...

    def __call__(
        self,
        denoiser: DenoiserLike,
        z_T: Tensor,
        condition: Condition = None,
        *,
        generator: Generators = None,
        on_step: OnStep | None = None,
    ) -> Tensor: ...


def timesteps(num_steps: int, steps: int, spacing: str = "trailing") -> list[int]:
    """The steps t that a sampler visits: `steps` transitions, strictly down, ending with 0.

        trailing  round(T i / steps), i = steps..1: starts at T
        leading   1 + i (T // steps), i = steps-1..0: starts below T, ends at 1
        linspace  1 + round((T - 1) i / (steps - 1)), i = steps-1..0: from T to 1 (one step: from T)

    They are diffusers' timesteps of the same name, plus 1.
    Source: Lin et al. 2024, arXiv:2305.08891, table 2.

    Raises:
        ValueError: if `spacing` is unknown; unless 1 <= steps <= T.
    """
    if not 1 <= steps <= num_steps:
        raise ValueError(f"a chain of T = {num_steps} steps can be sampled in 1 to {num_steps} steps; got {steps}")
    down = range(steps - 1, -1, -1)
    if spacing == "trailing":
        return [round(num_steps * i / steps) for i in range(steps, -1, -1)]
    if spacing == "leading":
        return [1 + i * (num_steps // steps) for i in down] + [0]
    if spacing == "linspace":
        return [1 + round((num_steps - 1) * i / (steps - 1)) if steps > 1 else num_steps for i in down] + [0]
    raise ValueError(f"unknown spacing {spacing!r}; known: {', '.join(SPACINGS)}")


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

        z_s = mean of q(z_s | z_t, z_0) + sqrt(Sigma(s, t, v)) n,   n ~ N(0, I)

    The step to s = 0 returns the mean and draws nothing.
    Source: Ho et al. 2020, arXiv:2006.11239, algorithm 2; any s < t.

    Raises:
        ValueError: unless 0 <= s < t <= T; where s > 0, if `variance` is unknown, or lacks the v or the z_0_mse
            that `log_variance` wants.
    """
    mean, _ = posterior(schedule, z_0, z_t, s, t)
    if s == 0:
        return mean
    std = (0.5 * log_variance(schedule, s, t, variance, like=mean, v=v, z_0_mse=z_0_mse)).exp()
    return mean + std * draw_noise(mean, generator)


def ddim_step(
    schedule: NoiseSchedule,
    z_0: Float[Tensor, " b *z"],
    z_t: Float[Tensor, " b *z"],
    *,
    s: int,
    t: int,
    eta: float = 0.0,
    generator: Generators = None,
) -> Float[Tensor, " b *z"]:
    """Move from z_t down to z_s, given the predicted clean latent z_0.

        z_s = sqrt(a_s) z_0 + sqrt(1 - a_s - v) eps + sqrt(v) n,   n ~ N(0, I)
        v   = eta^2 (1 - a_s) / (1 - a_t) (1 - a_t / a_s)

    eta = 0 draws nothing; eta = 1 draws from the posterior q(z_s | z_t, z_0).
    Source: Song et al. 2021, arXiv:2010.02502, eqs. 12 and 16.

    Raises:
        ValueError: unless 0 <= s < t <= T; unless 0 <= eta <= 1.
    """
    check_order(schedule, s, t)
    _check_eta(eta)
    eps = to_eps(schedule, z_0, z_t, t)
    a_s, a_t = schedule.at(s, eps), schedule.at(t, eps)
    v = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    # Where a_t is near 0 and eta = 1, v = 1 - a_s up to rounding: the difference may fall below 0.
    along_eps = (1 - a_s - v).clamp(min=0).sqrt()
    z_s = a_s.sqrt().to(eps) * z_0 + along_eps.to(eps) * eps
    if eta == 0 or s == 0:
        return z_s
    return z_s + v.sqrt().to(eps) * draw_noise(eps, generator)


@dataclass(frozen=True)
class Sampler:
    """A way down the chain.

    Args:
        method: ddpm, ddim, dpmpp (DPM-Solver++ of order 2, arXiv:2211.01095) or unipc (UniPC of order 2,
            arXiv:2302.04867). The last two are diffusers' and deterministic.
        steps: number of transitions, and of calls of the denoiser.
        eta: noise of ddim, 0 (deterministic) to 1 (ancestral); other methods take none.
        spacing: which steps are visited, see `timesteps`. dpmpp and unipc want trailing: the others make a
            last stop at t = 1, most of the log-SNR away, which a multistep method extrapolates badly.
        variance: Sigma of ddpm; the other methods have no use for it. None takes what the model has:
            learned_range where the denoiser answers with v, else fixed_small.
        clip: if set, the predicted z_0 is clamped to [-clip, clip].

    Raises:
        ValueError: if an option is unknown or out of range.
    """

    method: str
    steps: int
    eta: float = 0.0
    spacing: str = "trailing"
    variance: str | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        for option, value, known in (
            ("method", self.method, METHODS),
            ("spacing", self.spacing, SPACINGS),
            ("variance", self.variance, get_args(VarianceType)),
        ):
            if value is not None and value not in known:
                raise ValueError(f"unknown sampler {option} {value!r}; known: {', '.join(known)}")
        _check_eta(self.eta)
        if self.eta != 0 and self.method != "ddim":
            raise ValueError(f"eta is an option of ddim; {self.method} takes none, got eta = {self.eta}")
        if type(self.steps) is not int:
            raise ValueError(f"sampler.steps must be a whole number; got {self.steps}")
        if self.steps < 1:
            raise ValueError(f"a sampler takes at least one step; got steps = {self.steps}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be positive, or None for no clipping; got {self.clip}")

    def check(self, schedule: NoiseSchedule) -> None:
        """Refuse a chain that this sampler cannot run on.

        Raises:
            ValueError: if the chain has fewer steps than the sampler.
        """
        timesteps(schedule.num_steps, self.steps, self.spacing)

    @torch.no_grad()
    def __call__(
        self,
        denoiser: DenoiserLike,
        z_T: Float[Tensor, " b *z"],
        condition: Condition = None,
        *,
        z_0_mse: Float64[Tensor, " num_entries"] | None = None,
        generator: Generators = None,
        on_step: OnStep | None = None,
    ) -> Float[Tensor, " b *z"]:
        """Take z_T ~ N(0, I) down to z_0.

        Args:
            z_0_mse: the denoiser's error at every t, which ddpm with variance optimal needs.
            generator: one for the batch, or a list with one per sample.
            on_step: called as on_step(s, z_s, z_0) after every transition, with where it arrived and the
                predicted z_0 that it used. unipc corrects z_s once more at its next step.

        Raises:
            ValueError: if the chain has fewer steps than the sampler; if a list of generators is not one per
                sample; for dpmpp and unipc, if several visited steps are pure noise.
        """
        if isinstance(generator, list) and len(generator) != len(z_T):
            raise ValueError(f"{len(generator)} generators for a batch of {len(z_T)}: give one per sample, or one")
        schedule = denoiser.schedule
        visited = timesteps(schedule.num_steps, self.steps, self.spacing)
        z_t = at_least_float32(z_T)
        solver = self._solver(schedule, visited, z_t)
        for t, s in zip(visited, visited[1:], strict=False):
            z_0, v = denoiser(z_t, t, condition)
            if self.clip is not None:
                z_0 = z_0.clamp(-self.clip, self.clip)
            if self.method == "ddpm":
                variance = self.variance or ("fixed_small" if v is None else "learned_range")
                z_t = ddpm_step(
                    schedule, z_0, z_t, s=s, t=t, variance=variance, v=v, z_0_mse=z_0_mse, generator=generator
                )
            elif self.method == "ddim":
                z_t = ddim_step(schedule, z_0, z_t, s=s, t=t, eta=self.eta, generator=generator)
            else:
                z_t = solver.step(z_0, t - 1, z_t, return_dict=False)[0]
            if on_step is not None:
                on_step(s, z_t, z_0)
        return z_t

    def _solver(self, schedule: NoiseSchedule, visited: list[int], like: Tensor) -> Any:
        """diffusers' solver over our steps, or None where the method is ours.

        Set by hand, not by its set_timesteps, which has its own spacing, and sigmas from a float32 product.
        """
        if self.method not in ("dpmpp", "unipc"):
            return None
        solver_class: Any = DPMSolverMultistepScheduler if self.method == "dpmpp" else UniPCMultistepScheduler
        alpha_bar = schedule.alpha_bar.cpu().clamp(min=ALPHA_BAR_FLOOR)
        solver = solver_class(
            num_train_timesteps=schedule.num_steps,
            trained_betas=(1 - alpha_bar[1:] / alpha_bar[:-1]).tolist(),
            solver_order=2,
            prediction_type="sample",
        )
        a_t = alpha_bar[visited]
        if (a_t[1:] <= ALPHA_BAR_FLOOR).any():
            raise ValueError(
                f"{self.method} cannot step between steps of pure noise: alpha_bar of schedule "
                f"{schedule.name!r} is below {ALPHA_BAR_FLOOR} before T; use ddim, or a gentler schedule"
            )
        solver.sigmas = ((1 - a_t) / a_t).sqrt().to(like.dtype)
        solver.timesteps = torch.tensor(visited[:-1], device=like.device) - 1
        solver.num_inference_steps = self.steps
        solver.set_begin_index(0)
        return solver


def draw_noise(like: Tensor, generator: Generators) -> Tensor:
    """N(0, I) in the shape of `like`, each sample from its own generator where there is one per sample."""
    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1]; got {eta}")
