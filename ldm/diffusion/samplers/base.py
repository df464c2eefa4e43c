"""The sampler interface, and the sampling loop shared by all discrete samplers.

A discrete sampler visits a strided subset of the steps and predicts z_0 at each of them.
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
from ldm.diffusion.portable import trailing_steps
from ldm.diffusion.schedule import NoiseSchedule
from ldm.rules import Positive, Steps, apply_rules

SPACINGS = ("trailing", "leading", "linspace")

Generators = torch.Generator | list[torch.Generator] | None
"""One generator for the whole batch, or a list with one per sample, which makes samples independent of their batch."""

OnStep = Callable[[float, Tensor, Tensor], None]
"""Callback, called as on_step(s, z_s, z_0) after every transition to a step or real time s."""

Transition = Callable[[Prediction, Tensor, int, int], Tensor]
"""Reverse step of the chain: transition(prediction, z_t, s, t) returns z_s."""


class SamplerLike(Protocol):
    """Interface of samplers, which map z_T ~ N(0, I) to z_0 using the Markov chain, its SDE or its ODE.

    `method` is the sampler's name in configs and reports. `variance` is the choice of Sigma in p(z_s | z_t) that the
    sampler requires, or None.
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
class SamplingRun:
    """Inputs of one sampling run.

    `variance` is the model's choice of Sigma, and `z_0_mse` is the denoiser's mean squared error in z_0 at every t.
    """

    schedule: NoiseSchedule
    visited: list[int]
    z_T: Tensor
    variance: str | None
    z_0_mse: Tensor | None
    generator: Generators


@dataclass(frozen=True)
class ChainSampler(ABC):
    """Sampler that visits the discrete steps of the chain; each subclass implements one algorithm.

    Args:
        steps: number of transitions, each with one call to the denoiser.
        spacing: which steps are visited; see `timesteps`.
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
        """The choice of Sigma that the sampler requires; None if it needs no Sigma or uses the model's choice."""
        return None

    def check(self, schedule: NoiseSchedule) -> None:
        """Check that this sampler can run on `schedule`.

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
        """Sample z_0, starting from z_T ~ N(0, I).

        Args:
            variance: the model's choice of Sigma, which is the default for samplers that need a Sigma.
            z_0_mse: the denoiser's mean squared error in z_0 at every t, required by variance="optimal".
            generator: one for the whole batch, or a list with one per sample.
            on_step: called as on_step(s, z_s, z_0) after every transition to a step s, with the predicted z_0 that the
                transition used. UniPC corrects z_s again in its next step.

        Raises:
            ValueError: if the chain has fewer steps than the sampler, if the number of generators in a list differs
                from the batch size, or if a multistep solver visits more than one step at which z_t is pure noise.
        """
        check_generators(generator, len(z_T))
        schedule = denoiser.schedule
        visited = timesteps(schedule.num_steps, self.steps, self.spacing)
        z_t = at_least_float32(z_T)
        transition = self._transition(SamplingRun(schedule, visited, z_t, variance, z_0_mse, generator))
        for t, s in itertools.pairwise(visited):
            z_0, v = denoiser(z_t, t, condition)
            if self.clip is not None:
                z_0 = z_0.clamp(-self.clip, self.clip)
            z_t = transition(Prediction(z_0, v), z_t, s, t)
            if on_step is not None:
                on_step(s, z_t, z_0)
        return z_t

    @abstractmethod
    def _transition(self, run: SamplingRun) -> Transition:
        """Return the algorithm's transition function for one sampling run."""


def timesteps(num_steps: int, steps: int, spacing: str = "trailing") -> list[int]:
    """Return the steps t that a sampler visits, strictly decreasing to 0 in `steps` transitions.

        trailing  round(T i / steps), i = steps..1: starts at T
        leading   1 + i (T // steps), i = steps-1..0: starts below T, reaches 1
        linspace  1 + round((T - 1) i / (steps - 1)), i = steps-1..0: starts at T, reaches 1 (only T if steps = 1)

    Each list then ends with 0. Its other entries are diffusers' timesteps for the spacing of the same name, plus 1.
    Source: Lin et al. 2024, arXiv:2305.08891, table 2.

    Raises:
        ValueError: if `spacing` is unknown, or if steps is not in 1..T.
    """
    check_choice("spacing", spacing, SPACINGS)
    if not 1 <= steps <= num_steps:
        raise ValueError(f"a chain of T = {num_steps} steps can be sampled in 1 to {num_steps} steps; got {steps}")
    indices = range(steps - 1, -1, -1)
    if spacing == "trailing":
        return trailing_steps(num_steps, steps)
    if spacing == "leading":
        return [1 + i * (num_steps // steps) for i in indices] + [0]
    return [1 + round((num_steps - 1) * i / (steps - 1)) if steps > 1 else num_steps for i in indices] + [0]


def draw_noise(like: Tensor, generator: Generators) -> Tensor:
    """Draw N(0, I) noise shaped like `like`, using each sample's own generator if there is one per sample."""
    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def check_generators(generator: Generators, batch: int) -> None:
    """Raise a ValueError if a list of generators does not have one per sample."""
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(
            f"got {len(generator)} generators for a batch of {batch}. Pass one per sample, or a single generator"
        )
