"""Noise schedules: how much of the signal remains after t of T steps.

A schedule defines a Markov chain z_0, z_1, ..., z_T with q(z_t | z_0) = N(sqrt(a_t) z_0, (1 - a_t) I), where
a_t = alpha_bar[t] decreases from a_0 = 1 towards 0. The table alpha_bar has T + 1 entries, so a reverse step can go
from any t to any s < t, including s = 0. u = t / T is the continuous time.

For real t in [1, T], log-SNR = log(a_t / (1 - a_t)) is interpolated by a monotone C1 curve. There is no interpolation
below t = 1, because log-SNR diverges at t = 0.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64, Int
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq
from torch import Tensor

from ldm.rules import Steps, checked

Step = int | float | Int[Tensor, " b"] | Float[Tensor, " b"]
"""A step of the chain or a real time in [1, T], as one number for the whole batch or a tensor with one per sample."""

# Floor that avoids log-SNR = -inf where alpha_bar = 0. The floor changes z by only 1e-10.
ALPHA_BAR_FLOOR = 1e-20


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A table of alpha_bar over the steps 0..T, in float64.

    >>> import torch
    >>> from ldm import NoiseSchedule
    >>> schedule = NoiseSchedule("halving", 0.5 ** torch.arange(5, dtype=torch.float64))
    >>> schedule.num_steps, schedule.snr(1).item()
    (4, 1.0)

    The table is in float64 because 1 - a_t and 1 - a_t / a_s suffer from cancellation in float32. Coefficients are
    computed from `at` in float64, on the table's device, and cast with `.to(z)` just before they multiply a tensor.
    `to` moves the table to another device. MPS has no float64, so keep the table on the CPU if the latents are on MPS.
    Real times are interpolated on the CPU.

    Args:
        name: the name of the schedule in configs and messages.
        alpha_bar: the table, float64 of shape [T + 1], strictly decreasing in [0, 1], with alpha_bar[0] = 1.

    Raises:
        ValueError: if alpha_bar violates one of these rules.
    """

    name: str
    alpha_bar: Tensor

    def __post_init__(self) -> None:
        table = self.alpha_bar
        rule = f"schedule {self.name!r}: alpha_bar"
        if table.dtype != torch.float64:
            raise ValueError(
                f"{rule} must be float64, because 1 - alpha_bar loses precision in float32; got {table.dtype}"
            )
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(f"{rule} must have shape [T + 1] with T >= 1; got {list(table.shape)}")
        if table[0] != 1:
            raise ValueError(f"{rule}[0] must be 1 (the clean latent); got {table[0].item()}")
        if not table[-1] >= 0:
            raise ValueError(f"{rule}[T] must be at least 0; got {table[-1].item()}")
        is_bad = ~(table.diff() < 0)
        if is_bad.any():
            t = int(is_bad.nonzero()[0]) + 1
            raise ValueError(
                f"{rule} must be strictly decreasing; got alpha_bar[{t - 1}] = {table[t - 1].item()} and "
                f"alpha_bar[{t}] = {table[t].item()}"
            )

    @property
    def num_steps(self) -> int:
        """T, the length of the chain."""
        return len(self.alpha_bar) - 1

    @property
    def betas(self) -> Float64[Tensor, " num_steps"]:
        """beta_t = 1 - a_t / a_{t-1} for t = 1..T, called trained_betas in diffusers."""
        return 1 - self.alpha_bar[1:] / self.alpha_bar[:-1]

    def at(self, t: Step, like: Float[Tensor, " b *z"]) -> Float64[Tensor, " _ *_"]:
        """Return a_t in float64 on the table's device, with shape [b or 1, 1, ..., 1], broadcastable to `like`.

        If t is real and has an integer value, the result is exactly the table's entry.

        Raises:
            ValueError: if t is neither an integer in 0..T nor a real number in [1, T]. For a real t, also as raised by
                `log_snr_curve`.
        """
        return self._gather(t).reshape(-1, *(1,) * (like.ndim - 1))

    def snr(self, t: Step) -> Float64[Tensor, " *b"]:
        """Return the signal-to-noise ratio a_t / (1 - a_t) in float64; infinite at t = 0.

        The shape is [] for a number and [b] for a tensor of steps.

        Raises:
            ValueError: as raised by `at`.
        """
        a_t = self._gather(t)
        return a_t / (1 - a_t)

    @cached_property
    def log_snr_curve(self) -> PchipInterpolator:
        """log-SNR for real t in [1, T]: the monotone C1 PCHIP interpolant of the table, in float64.

        alpha_bar[T] = 0 is replaced by 1e-20.
        Source: Fritsch and Butland 1984, doi:10.1137/0905021, as implemented in scipy.

        Raises:
            ValueError: if the chain has fewer than 2 steps, or if alpha_bar is below 1e-20 before T.
        """
        if self.num_steps < 2:
            raise ValueError(f"schedule {self.name!r} has only one step; interpolation to real t needs at least two")
        if self.alpha_bar[-2] <= ALPHA_BAR_FLOOR:
            raise ValueError(
                f"schedule {self.name!r} cannot be interpolated to real t, because alpha_bar falls below "
                f"{ALPHA_BAR_FLOOR} before T. Use a schedule that adds less noise"
            )
        log_snr = self.alpha_bar[1:].cpu().clamp(min=ALPHA_BAR_FLOOR).logit()
        return PchipInterpolator(range(1, self.num_steps + 1), log_snr.numpy())

    def rate(self, t: Step) -> Float64[Tensor, " *b"]:
        """Return b(t) = -d log a / dt = (1 - a_t) (-d log-SNR / dt) >= 0, per unit of t.

        Multiply b(t) by T to get the rate per unit of u. The integral of b from s to t is log(a_s / a_t). The result
        is in float64 on the table's device and has the shape of `snr(t)`.

        Raises:
            ValueError: if t is not in [1, T], or as raised by `log_snr_curve`.
        """
        time = step_tensor(t).double()
        a_t = self._interpolate(time)
        return (1 - a_t) * -self._curve(time, derivative=1)

    def time_at(self, log_snr: float) -> float:
        """Return the real t at which the schedule has this log-SNR, clamped to [1, T].

        Raises:
            ValueError: as raised by `log_snr_curve`.
        """
        curve = self.log_snr_curve
        if log_snr >= curve(1):
            return 1.0
        if log_snr <= curve(self.num_steps):
            return float(self.num_steps)
        knot = int((curve.c[-1] > log_snr).sum())
        return float(brentq(lambda t: curve(t) - log_snr, knot, knot + 1))

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """Return a copy of the schedule with its table on `device`."""
        return dataclasses.replace(self, alpha_bar=self.alpha_bar.to(device))

    def _gather(self, t: Step) -> Tensor:
        index = step_tensor(t)
        if index.is_floating_point():
            return self._interpolate(index)
        if ((index < 0) | (index > self.num_steps)).any():
            raise ValueError(f"schedule {self.name!r} has steps 0..{self.num_steps}; got t = {t}")
        return self.alpha_bar[index.to(self.alpha_bar.device)]

    def _interpolate(self, t: Tensor) -> Tensor:
        if not ((t >= 1) & (t <= self.num_steps)).all():
            raise ValueError(
                f"real times of schedule {self.name!r} must be in [1, {self.num_steps}]; got t = {t.tolist()}"
            )
        step = t.to(self.alpha_bar.device).round().long()
        return torch.where((t == t.round()).to(step.device), self.alpha_bar[step], self._curve(t).sigmoid())

    def _curve(self, t: Tensor, derivative: int = 0) -> Tensor:
        values = self.log_snr_curve(t.detach().cpu().double().numpy(), derivative)
        return torch.as_tensor(values, device=self.alpha_bar.device)


def step_tensor(t: Step) -> Tensor:
    """Convert a step to a tensor. Integers stay integers, and a Python float becomes float64."""
    return torch.as_tensor(t, dtype=torch.float64 if isinstance(t, float) else None)


@checked
def linear(num_steps: Steps = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """Return the schedule whose beta_t is linear in t.

    Source: Ho et al. 2020, arXiv:2006.11239, section 4.

    Raises:
        ValueError: if a beta is outside (0, 1], as raised by `NoiseSchedule`.
    """
    return from_betas("linear", torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64))


@checked
def scaled_linear(num_steps: Steps = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
    """Return the schedule of latent diffusion and Stable Diffusion, whose sqrt(beta_t) is linear in t.

    Source: Rombach et al. 2022, arXiv:2112.10752 (the authors' code; the paper does not state the schedule).

    Raises:
        ValueError: if a beta is outside (0, 1], as raised by `NoiseSchedule`.
    """
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64)
    return from_betas("scaled_linear", roots**2)


@checked
def cosine(num_steps: Steps = 1000, offset: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
    """Return the cosine schedule a_t = f(u) / f(0), f(u) = cos^2(pi/2 (u + offset) / (1 + offset)), beta_t <= max_beta.

    >>> from ldm import cosine
    >>> [round(cosine(1000).alpha_bar[t].item(), 3) for t in (0, 250, 500, 750, 1000)]
    [1.0, 0.847, 0.494, 0.144, 0.0]

    The cap on beta_t keeps a_T above 0, so that eps can be predicted at every t.
    Source: Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17.

    Raises:
        ValueError: if the table is not strictly decreasing.
    """
    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    f = torch.cos(math.pi / 2 * (u + offset) / (1 + offset)) ** 2
    return from_betas("cosine", (1 - f[1:] / f[:-1]).clamp(max=max_beta))


@checked
def rectified_flow(num_steps: Steps = 1000) -> NoiseSchedule:
    """Return the schedule a_t = (1-u)^2 / ((1-u)^2 + u^2) of rectified flow.

    The paths (1-u) z_0 + u eps are straight and are rescaled to preserve variance. Since a_T = 0, the chain ends in
    pure noise, where a prediction of eps does not determine z_0.
    Source: Liu et al. 2023, arXiv:2209.03003; the rescaling is from Kingma and Gao 2023, arXiv:2303.00848.

    Raises:
        ValueError: if num_steps is less than 1.
    """
    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    signal, noise = (1 - u) ** 2, u**2
    return NoiseSchedule("rectified_flow", signal / (signal + noise))


def from_betas(name: str, betas: Float64[Tensor, " num_steps"]) -> NoiseSchedule:
    """Return the schedule a_t = (1 - beta_1) ... (1 - beta_t).

    Raises:
        ValueError: if a beta is outside (0, 1], as raised by `NoiseSchedule`.
    """
    return NoiseSchedule(name, torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)]))
