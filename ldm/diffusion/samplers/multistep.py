"""diffusers' multistep solvers of the probability-flow ODE, on our steps and sigmas. Deterministic."""

from typing import Any, ClassVar

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.samplers.base import ChainSampler, Transition, Walk
from ldm.diffusion.schedule import ALPHA_BAR_FLOOR


class Multistep(ChainSampler):
    """A solver of order 2 that extrapolates from its earlier predictions of z_0.

    Use trailing steps. The other spacings make their last stop at t = 1, after a jump over most of the log-SNR range,
    where a multistep method extrapolates badly.
    """

    solver: ClassVar[Any]

    def _transition(self, walk: Walk) -> Transition:
        # Bypass diffusers' set_timesteps, which uses its own spacing and computes sigmas from a float32 product.
        schedule = walk.schedule
        alpha_bar = schedule.alpha_bar.cpu().clamp(min=ALPHA_BAR_FLOOR)
        solver = self.solver(
            num_train_timesteps=schedule.num_steps,
            trained_betas=(1 - alpha_bar[1:] / alpha_bar[:-1]).tolist(),
            solver_order=2,
            prediction_type="sample",
        )
        a_t = alpha_bar[walk.visited]
        if (a_t[1:] <= ALPHA_BAR_FLOOR).any():
            raise ValueError(
                f"{self.method} cannot step between steps of pure noise: alpha_bar of schedule "
                f"{schedule.name!r} is below {ALPHA_BAR_FLOOR} before T; use ddim, or a gentler schedule"
            )
        solver.sigmas = ((1 - a_t) / a_t).sqrt().to(walk.z_T.dtype)
        solver.timesteps = torch.tensor(walk.visited[:-1], device=walk.z_T.device) - 1
        solver.num_inference_steps = self.steps
        solver.set_begin_index(0)

        def transition(prediction: Prediction, z_t: Tensor, s: int, t: int) -> Tensor:
            return solver.step(prediction.z_0, t - 1, z_t, return_dict=False)[0]

        return transition


class DPMSolver(Multistep):
    """DPM-Solver++ of order 2 (Lu et al. 2022, arXiv:2211.01095).

    >>> import torch
    >>> from ldm import Denoiser, DPMSolver, cosine
    >>> denoiser = Denoiser(cosine(1000), lambda z_t, timestep, condition: 0 * z_t + 1, prediction="z_0")
    >>> z_0 = DPMSolver(steps=10)(denoiser, torch.randn(2, 4, 8, 8))
    >>> torch.allclose(z_0, torch.ones_like(z_0), atol=1e-4)
    True
    """

    method = "dpmpp"
    solver = DPMSolverMultistepScheduler


class UniPC(Multistep):
    """UniPC of order 2 (Zhao et al. 2023, arXiv:2302.04867)."""

    method = "unipc"
    solver = UniPCMultistepScheduler
