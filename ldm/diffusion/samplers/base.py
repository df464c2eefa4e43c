"""What every sampler promises, and the walk down the chain that the discrete ones share.

A discrete sampler takes any strided subset of the steps, and asks a denoiser for z_0 at each.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Float64
from torch import Tensor

from ldm.diffusion.chain import at_least_float32, check_choice
from ldm.diffusion.denoiser import Condition, DenoiserLike, Prediction
from ldm.diffusion.schedule import NoiseSchedule
from ldm.rules import Positive, Steps, apply_rules

SPACINGS = ("trailing", "leading", "linspace")

Generators = torch.Generator | list[torch.Generator] | None
"""One generator for the batch, or one per sample: sample i then depends on its own alone."""

OnStep = Callable[[float, Tensor, Tensor], None]
"""Called as on_step(s, z_s, z_0) after every transition, with where it arrived and a predicted z_0."""

Transition = Callable[[Prediction, Tensor, int, int], Tensor]
"""A step down the chain: transition(prediction, z_t, s, t) is z_s."""


class SamplerLike(Protocol):
    """Any way from z_T ~ N(0, I) to z_0: down the chain, or along its SDE or ODE.

    `method` is its name in configs and records, `variance` the Sigma of p(z_s | z_t) that it insists on, if any.
    """

    @property
    def method(self) -> str: ...

    @property
    def steps(self) -> int: ...

    @property
    def variance(self) -> str | None: ...

    def check(self, schedule: NoiseSchedule) -> None: ...

    def __call__(
        self,
        denoiser: DenoiserLike,
        z_T: Tensor,
        condition: Condition | None = None,
        *,
        variance: str | None = None,
        z_0_mse: Tensor | None = None,
        generator: Generators = None,
        on_step: OnStep | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Walk:
    """One walk down the chain: the steps it visits, its first latents, the model's own Sigma and error, its noise."""

    schedule: NoiseSchedule
    visited: list[int]
    z_T: Tensor
    variance: str | None
    z_0_mse: Tensor | None
    generator: Generators


@dataclass(frozen=True)
class ChainSampler(ABC):
    """A walk down the chain's own steps; each subclass is an algorithm for one of them.

    Args:
        steps: number of transitions, and of calls of the denoiser.
        spacing: which steps are visited, see `timesteps`.
        clip: if set, the predicted z_0 is clamped to [-clip, clip].

    Raises:
        ValueError: if an option is unknown or out of range.
    """

    method: ClassVar[str]
    steps: Steps
    spacing: str = "trailing"
    clip: Positive | None = None

    def __post_init__(self) -> None:
        apply_rules(type(self), vars(self))
        check_choice("spacing", self.spacing, SPACINGS)

    @property
    def variance(self) -> str | None:
        """The Sigma that it insists on; None where it has no use for one, or takes the model's."""
        return None

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
        condition: Condition | None = None,
        *,
        variance: str | None = None,
        z_0_mse: Float64[Tensor, " num_entries"] | None = None,
        generator: Generators = None,
        on_step: OnStep | None = None,
    ) -> Float[Tensor, " b *z"]:
        """Take z_T ~ N(0, I) down to z_0.

        Args:
            variance: the model's own Sigma, for a sampler that draws with one and was given none.
            z_0_mse: the denoiser's error at every t, which Sigma optimal needs.
            generator: one for the batch, or a list with one per sample.
            on_step: called as on_step(s, z_s, z_0) after every transition, with where it arrived and the
                predicted z_0 that it used. UniPC corrects z_s once more at its next step.

        Raises:
            ValueError: if the chain has fewer steps than the sampler; if a list of generators is not one per
                sample; for multistep solvers, if several visited steps are pure noise.
        """
        check_generators(generator, len(z_T))
        schedule = denoiser.schedule
        visited = timesteps(schedule.num_steps, self.steps, self.spacing)
        z_t = at_least_float32(z_T)
        transition = self._transition(Walk(schedule, visited, z_t, variance, z_0_mse, generator))
        for t, s in itertools.pairwise(visited):
            z_0, v = denoiser(z_t, t, condition)
            if self.clip is not None:
                z_0 = z_0.clamp(-self.clip, self.clip)
            z_t = transition(Prediction(z_0, v), z_t, s, t)
            if on_step is not None:
                on_step(s, z_t, z_0)
        return z_t

    @abstractmethod
    def _transition(self, walk: Walk) -> Transition:
        """The algorithm's step on one walk."""


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
    check_choice("spacing", spacing, SPACINGS)
    if not 1 <= steps <= num_steps:
        raise ValueError(f"a chain of T = {num_steps} steps can be sampled in 1 to {num_steps} steps; got {steps}")
    down = range(steps - 1, -1, -1)
    if spacing == "trailing":
        return [round(num_steps * i / steps) for i in range(steps, -1, -1)]
    if spacing == "leading":
        return [1 + i * (num_steps // steps) for i in down] + [0]
    return [1 + round((num_steps - 1) * i / (steps - 1)) if steps > 1 else num_steps for i in down] + [0]


def draw_noise(like: Tensor, generator: Generators) -> Tensor:
    """N(0, I) in the shape of `like`, each sample from its own generator where there is one per sample."""
    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def check_generators(generator: Generators, batch: int) -> None:
    """Refuse a list of generators that is not one per sample."""
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for a batch of {batch}: give one per sample, or one")
