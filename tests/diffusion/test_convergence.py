"""Tests of the convergence order of the deterministic samplers, with an independent ODE integration as reference."""

import math

import numpy as np
import pytest
import scipy.integrate
import torch

from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.multistep import DPMSolver, UniPC
from ldm.diffusion.schedule import NoiseSchedule

# diffusers rounds timesteps to integers, so T is large and a multiple of every entry of STEPS.
T = 20_480
STEPS = [20, 40, 80, 160, 320]
MEANS, WEIGHTS, VARIANCE = np.array([-1.0, 1.5]), np.array([0.4, 0.6]), 0.25


def alpha_bar(u):
    return np.exp(-(0.1 * u + 9.95 * u**2))


def flow(u, z):
    """Return dz/du = -1/2 b(u) (z + score) for the variance-preserving SDE with b(u) = 0.1 + 19.9 u."""
    a = alpha_bar(u)
    marginal_variance = a * VARIANCE + 1 - a
    offset = z[:, None] - math.sqrt(a) * MEANS
    weights = WEIGHTS * np.exp(-(offset**2) / (2 * marginal_variance))
    score = -(weights * offset).sum(1) / weights.sum(1) / marginal_variance
    return -0.5 * (0.1 + 19.9 * u) * (z + score)


def errors_and_orders(exact_mixture, sampler, s):
    """Return the largest error at timestep s for each number of steps in STEPS, and the observed orders."""
    schedule = NoiseSchedule("vp", torch.from_numpy(alpha_bar(np.arange(T + 1) / T)))
    exact = exact_mixture(schedule, MEANS[:, None], WEIGHTS, VARIANCE)
    z_T = np.linspace(-2, 2, 9)
    reference = scipy.integrate.solve_ivp(flow, (1, s / T), z_T, method="DOP853", rtol=1e-12, atol=1e-13)
    errors = []
    for steps in STEPS:
        latents = {}
        sampler(steps)(
            exact,
            torch.from_numpy(z_T)[:, None],
            on_step=lambda step, z_s, z_0, latents=latents: latents.update({step: z_s}),
        )
        errors.append(np.abs(latents[s].flatten().numpy() - reference.y[:, -1]).max())
    orders = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]
    columns = " ".join(f"{error:.2e}" for error in errors), " ".join(f"{order:.2f}" for order in orders)
    print(f"\n{sampler.method} at t = {s} in {STEPS} steps: errors {columns[0]}, orders {columns[1]}")
    return errors, orders


# UniPC's corrector raises the order of its predictor (2 here) by one.
@pytest.mark.parametrize(("sampler", "order"), [(DDIM, 1), (DPMSolver, 2), (UniPC, 3)])
def test_convergence_order_at_intermediate_step(exact_mixture, sampler, order):
    errors, orders = errors_and_orders(exact_mixture, sampler, T // 10)
    assert errors[-1] < errors[0] / 10**order
    assert orders[-1] == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("sampler", [DDIM, DPMSolver, UniPC])
def test_samplers_converge_at_s_0(exact_mixture, sampler):
    # The last step, to alpha_bar = 1, is first order for every method and eventually dominates the error.
    errors, orders = errors_and_orders(exact_mixture, sampler, 0)
    assert min(orders) > 0.5
    assert errors[-1] < errors[0] / 14
