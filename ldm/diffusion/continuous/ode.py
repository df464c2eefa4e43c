"""The probability-flow ODE: a deterministic sampler, and its inverse, which encodes latents as noise.

The ODE dz/dt = -1/2 b (z + score) from `sde` is solved in the time variable w defined in `clock`:

    dz/dw = 1/2 (d log-SNR / dw) alpha (z_0 - alpha z),   log-SNR = 2 sinh(w)
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.integrate import RK45
from torch import Tensor

from ldm.diffusion.chain import at_least_float32, check_choice
from ldm.diffusion.continuous.clock import clock_elapsed, clock_ends, clock_nodes, clock_time
from ldm.diffusion.continuous.sde import probability_flow
from ldm.diffusion.denoiser import Condition, DenoiserLike
from ldm.diffusion.samplers.base import Generators, OnStep
from ldm.diffusion.schedule import NoiseSchedule
from ldm.rules import Steps, apply_rules

SOLVERS = ("heun", "adaptive")


def integrate(
    derivative: Callable[[float, np.ndarray], np.ndarray],
    state: np.ndarray,
    start: float,
    stop: float,
    *,
    rtol: float,
    atol: float,
    on_accept: Callable[[float, np.ndarray], None] | None = None,
) -> tuple[np.ndarray, int]:
    """Integrate d state / dw from start to stop; return the final state and the number of evaluations.

    Uses the Dormand-Prince 5(4) method. After each accepted step, on_accept(w, state) is called; the last
    derivative evaluated before the call is the one at the accepted state.

    Raises:
        ValueError: unless rtol and atol are at least 1e-12.
        ArithmeticError: if the derivative is not finite, or if the step size becomes too small.
    """
    check_tolerances(rtol, atol)

    def checked_derivative(w: float, state: np.ndarray) -> np.ndarray:
        slope = derivative(w, state)
        if not np.isfinite(slope).all():
            raise ArithmeticError(f"the ODE derivative is not finite at w = {w}: the network returned inf or nan")
        return slope

    solver = RK45(checked_derivative, start, state, stop, rtol=rtol, atol=atol)
    while solver.status == "running":
        message = solver.step()
        if solver.status == "failed":
            raise ArithmeticError(f"the adaptive solver failed at w = {solver.t}: {message}")
        if on_accept is not None:
            on_accept(solver.t, solver.y)
    return solver.y, solver.nfev


def check_tolerances(rtol: float, atol: float) -> None:
    """Raise an error if the tolerances are too small for float64.

    Raises:
        ValueError: unless rtol and atol are at least 1e-12.
    """
    if not (rtol >= 1e-12 and atol >= 1e-12):
        raise ValueError(f"rtol and atol must be at least 1e-12; got rtol = {rtol}, atol = {atol}")


@dataclass(frozen=True)
class ODESampler:
    """Sampler that solves the probability-flow ODE, and encodes latents as noise by solving the ODE backwards.

    Args:
        solver: "heun" (order 2, equal steps on the clock) or "adaptive" (order 5, with a step size controlled by an
            error estimate). The adaptive solver keeps its state in float64 on the CPU. All samples in a batch share its
            step sizes, so each result depends slightly on the rest of the batch, within the tolerance.
        steps: for the Heun solver, the number of transitions, including the last one from t_min to 0. Sampling calls
            the denoiser `2 * steps - 1` times; `encode` and `decode` call it `2 * steps - 2` times. The adaptive solver
            ignores this option.
        rtol, atol: for the adaptive solver, the relative and absolute error tolerances per step, as in scipy.
        t_min: time at which the integration stops; the last transition returns the z_0 predicted at t_min.

    Source: Song et al. 2021, arXiv:2011.13456, section 4.3; the Heun solver is from Karras et al. 2022,
    arXiv:2206.00364.

    Raises:
        ValueError: if an option is unknown or out of range.
    """

    method: ClassVar[str] = "ode"
    variance: ClassVar[str | None] = None
    solver: str = "heun"
    steps: Steps = 20
    rtol: float = 1e-4
    atol: float = 1e-4
    t_min: int | float = 1.0

    def __post_init__(self) -> None:
        check_choice("ODE solver", self.solver, SOLVERS)
        apply_rules(type(self), vars(self))
        check_tolerances(self.rtol, self.atol)

    def check(self, schedule: NoiseSchedule) -> None:
        """Check that this sampler can run on `schedule`.

        Raises:
            ValueError: as raised by `clock_ends`.
        """
        clock_ends(schedule, self.t_min)

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
            variance, z_0_mse: ignored, because an ODE has no Sigma.
            generator: ignored, because sampling is deterministic.
            on_step: called as on_step(s, z_s, z_0) after every transition to a real time s (0 for the last one). z_0
                is predicted at the start of the transition by the Heun solver, and at s by the adaptive solver.

        Raises:
            ValueError: as raised by `check`.
            ArithmeticError: as raised by `integrate`.
        """
        z = self._integrate(denoiser, z_T, condition, on_step=on_step)
        t = self.t_min if self.solver == "adaptive" or self.steps > 1 else self._noise_end(denoiser.schedule)
        z_0 = denoiser(z, t, condition).z_0
        if on_step is not None:
            on_step(0, z_0, z_0)
        return z_0

    @torch.no_grad()
    def encode(
        self, denoiser: DenoiserLike, z: Float[Tensor, " b *z"], condition: Condition | None = None
    ) -> Float[Tensor, " b *z"]:
        """Encode z at t_min as noise, by solving the ODE up to the noise end.

        `decode` inverts this map up to the error of the solver, which depends on `steps` for the Heun solver and on the
        tolerances for the adaptive solver.

        Raises:
            ValueError: if the Heun solver has fewer than 2 steps, or as raised by `check`.
            ArithmeticError: as raised by `integrate`.
        """
        self._check_steps()
        return self._integrate(denoiser, z, condition, backwards=True)

    @torch.no_grad()
    def decode(
        self, denoiser: DenoiserLike, z_T: Float[Tensor, " b *z"], condition: Condition | None = None
    ) -> Float[Tensor, " b *z"]:
        """Decode noise to z at t_min, without the last transition to 0; the inverse of `encode`.

        Raises:
            ValueError: if the Heun solver has fewer than 2 steps, or as raised by `check`.
            ArithmeticError: as raised by `integrate`.
        """
        self._check_steps()
        return self._integrate(denoiser, z_T, condition)

    def _check_steps(self) -> None:
        if self.solver == "heun" and self.steps < 2:
            raise ValueError(f"encode and decode need at least 2 steps with solver 'heun'; got {self.steps}")

    def _noise_end(self, schedule: NoiseSchedule) -> float:
        return clock_time(schedule, clock_ends(schedule, self.t_min)[0])

    def _integrate(
        self,
        denoiser: DenoiserLike,
        z: Tensor,
        condition: Condition | None,
        *,
        backwards: bool = False,
        on_step: OnStep | None = None,
    ) -> Tensor:
        schedule = denoiser.schedule
        z = at_least_float32(z)

        def velocity(z: Tensor, w: float) -> tuple[Tensor, Tensor]:
            t, elapsed = clock_elapsed(schedule, w)
            z_0 = denoiser(z, t, condition).z_0
            return elapsed * probability_flow(schedule, z_0, z, t), z_0

        if self.solver == "adaptive":
            start, stop = clock_ends(schedule, self.t_min)
            span = (stop, start) if backwards else (start, stop)
            return _integrate_adaptively(velocity, schedule, z, span, self, on_step)
        nodes = clock_nodes(schedule, self.steps, self.t_min)
        for w, next_w in itertools.pairwise(nodes[::-1] if backwards else nodes):
            slope, z_0 = velocity(z, w)
            next_slope, _ = velocity(z + (next_w - w) * slope, next_w)
            z = z + (next_w - w) / 2 * (slope + next_slope)
            if on_step is not None:
                on_step(clock_time(schedule, next_w), z, z_0)
        return z


def _integrate_adaptively(
    velocity: Callable[[Tensor, float], tuple[Tensor, Tensor]],
    schedule: NoiseSchedule,
    like: Tensor,
    span: tuple[float, float],
    options: ODESampler,
    on_step: OnStep | None,
) -> Tensor:
    z_0 = like

    def to_tensor(state: np.ndarray) -> Tensor:
        return torch.tensor(state, dtype=like.dtype, device=like.device).reshape(like.shape)

    def derivative(w: float, state: np.ndarray) -> np.ndarray:
        nonlocal z_0
        slope, z_0 = velocity(to_tensor(state), w)
        return slope.flatten().cpu().double().numpy()

    def accept(w: float, state: np.ndarray) -> None:
        if on_step is not None:
            on_step(clock_time(schedule, w), to_tensor(state), z_0)

    start = like.flatten().cpu().double().numpy()
    state, _ = integrate(derivative, start, *span, rtol=options.rtol, atol=options.atol, on_accept=accept)
    return to_tensor(state)
