"""The clock w, the time variable in which the continuous chain's differential equations are solved.

The clock is w = asinh(log-SNR / 2). Near log-SNR = 0, where samples take shape, w is proportional to log-SNR.
Far from it, where little happens, w grows with its logarithm. The clock starts at the noise end: at T, or where
alpha_bar = 1e-8 if the chain goes below that, 1e-4 of z_0 away from N(0, I).

Alternatives were compared with Heun in 40 steps on exact mixtures: t, log-SNR, the angle of alpha and sigma, and
sigma^(1/7), each plain or in eps or z_0. On no schedule of `ldm.diffusion.schedule` does any of them have less than
half the error of equal steps of w. Equal steps of t have up to 20 times the error.
"""

import math

from ldm.diffusion.schedule import NoiseSchedule

_NOISE_END = math.log(1e-8)


def clock_ends(schedule: NoiseSchedule, t_min: int | float) -> tuple[float, float]:
    """Return the clock w = asinh(log-SNR / 2) at the noise end and at t_min.

    Raises:
        ValueError: unless 1 <= t_min < T and t_min is on the data side of the noise end,
            or if the chain has no real times.
    """
    curve = schedule.log_snr_curve
    if not 1 <= t_min < schedule.num_steps:
        raise ValueError(f"t_min must be in [1, T) with T = {schedule.num_steps}; got {t_min}")
    noise_end = max(float(curve(schedule.num_steps)), _NOISE_END)
    if curve(t_min) <= noise_end:
        raise ValueError(f"t_min = {t_min} is at the noise end of schedule {schedule.name!r}; use a smaller t_min")
    return math.asinh(noise_end / 2), math.asinh(float(curve(t_min)) / 2)


def clock_time(schedule: NoiseSchedule, w: float) -> float:
    """Return the real time t at which the clock shows w, so that log-SNR = 2 sinh(w).

    Raises:
        ValueError: if the chain has no real times.
    """
    return schedule.time_at(2 * math.sinh(w))


def clock_nodes(schedule: NoiseSchedule, nodes: int, t_min: int | float) -> list[float]:
    """Return clock values equally spaced from the noise end to t_min; a single node is the noise end.

    Raises:
        ValueError: as `clock_ends` does.
    """
    start, stop = clock_ends(schedule, t_min)
    return [start] + [start + (stop - start) * i / (nodes - 1) for i in range(1, nodes)]


def clock_elapsed(schedule: NoiseSchedule, w: float) -> tuple[float, float]:
    """Return the time t at which the clock shows w, and the elapsed b dt per unit of w there, which is negative.

        b dt / dw = -(1 - a_t) d log-SNR / dw = -(1 - a_t) 2 cosh(w)

    Raises:
        ValueError: if the chain has no real times.
    """
    return clock_time(schedule, w), -2 * math.cosh(w) / (1 + math.exp(2 * math.sinh(w)))
