"""The chain in continuous time: its stochastic differential equations and a sampler for the reverse SDE.

Time t is real and decreases from T to t_min >= 1; b(t) = -d log a / dt is the rate of the schedule. With
score = grad log q(z_t), the equations

    forward           dz = -1/2 b z dt + sqrt(b) dw
    reverse           dz = (-1/2 b z - b score) dt + sqrt(b) dw-bar
    probability flow  dz/dt = -1/2 b (z + score)

have the same marginals q(z_t). Time enters the equations only through b dt = -d log a = -(1 - a) d log-SNR, called the
elapsed b dt. Steps are measured in log-SNR, so b itself is never needed. The stiffness of the equations is at most one
per unit of log-SNR.
The sampler's steps are equally spaced on the clock defined in `ldm.diffusion.continuous.clock`. Sampling starts from
N(0, I) at the noise end.

Source: Song et al. 2021, arXiv:2011.13456.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float, Float64
from pydantic import Field
from torch import Tensor

from ldm.diffusion.chain import at_least_float32, check_order, score
from ldm.diffusion.continuous.clock import clock_ends, clock_nodes, clock_time
from ldm.diffusion.denoiser import Condition, DenoiserLike
from ldm.diffusion.samplers.base import Generators, OnStep, check_generators, draw_noise
from ldm.diffusion.schedule import NoiseSchedule, Step
from ldm.rules import Integer, Number, Steps, apply_rules


def reverse_drift(
    schedule: NoiseSchedule, z_0: Float[Tensor, " b *z"], z_t: Float[Tensor, " b *z"], t: Step
) -> Float[Tensor, " b *z"]:
    """Return the drift of the reverse SDE per elapsed b dt, given the predicted z_0:  -1/2 z_t - score.

    Multiply the result by schedule.rate(t) to get the drift per unit of t.
    Source: Song et al. 2021, arXiv:2011.13456, eq. 6.

    Raises:
        ValueError: unless 1 <= t <= T.
    """
    return -0.5 * at_least_float32(z_t) - score(schedule, z_0, z_t, t)


def probability_flow(
    schedule: NoiseSchedule, z_0: Float[Tensor, " b *z"], z_t: Float[Tensor, " b *z"], t: Step
) -> Float[Tensor, " b *z"]:
    """Return the probability flow per elapsed b dt, given the predicted z_0.

        -1/2 (z_t + score) = -1/2 alpha (z_0 - alpha z_t) / (1 - a_t)

    Multiply the result by schedule.rate(t) to get dz/dt. The code uses the right-hand side, because the left-hand side
    suffers from cancellation at the noise end.
    Source: Song et al. 2021, arXiv:2011.13456, eq. 13.

    Raises:
        ValueError: unless 1 <= t <= T.
    """
    check_order(schedule, 0, t)
    z_0, z_t = at_least_float32(z_0), at_least_float32(z_t)
    a_t = schedule.at(t, z_t)
    alpha = a_t.sqrt().to(z_t)
    return (-0.5 * a_t.sqrt() / (1 - a_t)).to(z_t) * (z_0 - alpha * z_t)


def forward_sde_step(
    schedule: NoiseSchedule, z_s: Float[Tensor, " b *z"], s: int | float, t: int | float, eps: Float[Tensor, " b *z"]
) -> Float[Tensor, " b *z"]:
    """Take one Euler-Maruyama step of the forward SDE, from s up to t.

        z_t = z_s - 1/2 h z_s + sqrt(h) eps,   h = (1 - a_s) (log-SNR_s - log-SNR_t)

    The weak order of this step is 1, whereas `chain.forward_step` is exact.

    Raises:
        ValueError: unless 1 <= s < t <= T.
    """
    _check_real_order(schedule, s, t)
    z_s = at_least_float32(z_s)
    h = _elapsed(schedule, s, t)
    return (1 - h / 2) * z_s + math.sqrt(h) * eps


def reverse_sde_step(
    schedule: NoiseSchedule,
    z_0: Float[Tensor, " b *z"],
    z_t: Float[Tensor, " b *z"],
    *,
    s: int | float,
    t: int | float,
    generator: Generators = None,
) -> Float[Tensor, " b *z"]:
    """Take one Euler-Maruyama step of the reverse SDE, from t down to s, given the predicted z_0.

        z_s = z_t + (1/2 z_t + score) h + sqrt(h) n,   h = (1 - a_t) (log-SNR_s - log-SNR_t),   n ~ N(0, I)

    The weak order of this step is 1.

    Raises:
        ValueError: unless 1 <= s < t <= T.
    """
    _check_real_order(schedule, s, t)
    z_t = at_least_float32(z_t)
    h = _elapsed(schedule, t, s)
    return z_t - h * reverse_drift(schedule, z_0, z_t, t) + math.sqrt(h) * draw_noise(z_t, generator)


def langevin_step(
    schedule: NoiseSchedule,
    z_0: Float[Tensor, " b *z"],
    z_t: Float[Tensor, " b *z"],
    *,
    t: Step,
    snr: float,
    generator: Generators = None,
) -> Float[Tensor, " b *z"]:
    """Take one step of Langevin dynamics on q(z_t); t does not change.

        z = z_t + h score + sqrt(2 h) n,   h = 2 snr^2 (1 - a_t),   n ~ N(0, I)

    The paper uses the step size 2 snr^2 (|n| / |score|)^2, averaged over the batch, which grows without bound as the
    score vanishes. Here, the ratio |n| / |score| is replaced with its value for pure noise, sigma.
    Source: Song et al. 2021, arXiv:2011.13456, algorithm 5.

    Raises:
        ValueError: unless 1 <= t <= T.
    """
    z_t = at_least_float32(z_t)
    h = 2 * snr**2 * (1 - schedule.at(t, z_t))
    drift = h.to(z_t) * score(schedule, z_0, z_t, t)
    return z_t + drift + (2 * h).sqrt().to(z_t) * draw_noise(z_t, generator)


@dataclass(frozen=True)
class SDESampler:
    """Euler-Maruyama sampler for the reverse SDE, optionally corrected by Langevin dynamics after every step.

    Args:
        steps: number of transitions, including the last one from t_min to 0. The denoiser is called
            steps + (steps - 1) corrector_steps times.
        corrector_steps: number of Langevin steps after every transition except the last.
        corrector_snr: signal-to-noise ratio of the Langevin steps; see `langevin_step`.
        t_min: time at which the SDE stops; the last transition returns the z_0 predicted at t_min.

    Source: Song et al. 2021, arXiv:2011.13456, algorithms 1 and 5.

    Raises:
        ValueError: if an option is out of range.
    """

    method: ClassVar[str] = "sde"
    variance: ClassVar[str | None] = None
    steps: Steps
    corrector_steps: Annotated[Integer, Field(ge=0)] = 0
    corrector_snr: Annotated[Number, Field(gt=0, lt=1)] = 0.16  # stable below 1
    t_min: int | float = 1.0

    def __post_init__(self) -> None:
        apply_rules(type(self), vars(self))

    def check(self, schedule: NoiseSchedule) -> None:
        """Check that this sampler can run on `schedule`.

        Raises:
            ValueError: if Euler-Maruyama needs more steps to be stable, or as raised by `clock_ends`.
        """
        start, stop = clock_ends(schedule, self.t_min)
        # In the worst case, a step h in log-SNR multiplies a deviation by 1 - h (1 + a) / 2. h is largest at one end.
        growth = max(math.cosh(w) * (1 + 1 / (1 + math.exp(-2 * math.sinh(w)))) for w in (start, stop))
        min_steps = 1 + math.ceil((stop - start) * growth / 2)
        if 1 < self.steps < min_steps:
            raise ValueError(
                f"Euler-Maruyama is unstable with {self.steps} steps on schedule {schedule.name!r}. Use at least "
                f"{min_steps} steps, or use sampler ddpm or ode"
            )

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
            variance, z_0_mse: ignored, because an SDE has no Sigma.
            generator: one for the whole batch, or a list with one per sample.
            on_step: called as on_step(s, z_s, z_0) after every transition to a real time s (0 for the last one), with
                the predicted z_0 that the transition used.

        Raises:
            ValueError: if the number of generators in a list differs from the batch size, or as raised by `check`.
        """
        check_generators(generator, len(z_T))
        schedule = denoiser.schedule
        self.check(schedule)
        z_t = at_least_float32(z_T)
        visited = [clock_time(schedule, w) for w in clock_nodes(schedule, self.steps, self.t_min)]
        for t, s in itertools.pairwise(visited):
            z_0 = denoiser(z_t, t, condition).z_0
            z_t = reverse_sde_step(schedule, z_0, z_t, s=s, t=t, generator=generator)
            for _ in range(self.corrector_steps):
                corrected_z_0 = denoiser(z_t, s, condition).z_0
                z_t = langevin_step(schedule, corrected_z_0, z_t, t=s, snr=self.corrector_snr, generator=generator)
            if on_step is not None:
                on_step(s, z_t, z_0)
        z_0 = denoiser(z_t, visited[-1], condition).z_0
        if on_step is not None:
            on_step(0, z_0, z_0)
        return z_0


def _check_real_order(schedule: NoiseSchedule, s: int | float, t: int | float) -> None:
    if not 1 <= s < t <= schedule.num_steps:
        raise ValueError(f"SDE times must satisfy 1 <= s < t <= T = {schedule.num_steps}; got s = {s}, t = {t}")


def _elapsed(schedule: NoiseSchedule, start: int | float, stop: int | float) -> float:
    """Return the elapsed b dt of a step, |d log a| to first order in the change of log-SNR."""
    curve = schedule.log_snr_curve
    return float(abs(curve(stop) - curve(start)) / (1 + math.exp(float(curve(start)))))
