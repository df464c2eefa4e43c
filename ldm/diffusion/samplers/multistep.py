"""diffusers' deterministic multistep solvers for the probability-flow ODE, with this package's timesteps and sigmas."""

from typing import Any, ClassVar

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.samplers.base import ChainSampler, SamplingRun, Transition
from ldm.diffusion.schedule import ALPHA_BAR_FLOOR


class Multistep(ChainSampler):
    """Second-order solver that extrapolates from the previous predictions of z_0.

    Use spacing="trailing". With the other spacings, the transition to t = 1 spans most of the log-SNR range, which is
    too far for a multistep method to extrapolate.
    """

    solver: ClassVar[Any]

    def _transition(self, run: SamplingRun) -> Transition:
        # Bypass diffusers' set_timesteps, which uses its own spacing and computes sigmas from a float32 product.
        schedule = run.schedule
        alpha_bar = schedule.alpha_bar.cpu().clamp(min=ALPHA_BAR_FLOOR)
        solver = self.solver(
            num_train_timesteps=schedule.num_steps,
            trained_betas=(1 - alpha_bar[1:] / alpha_bar[:-1]).tolist(),
            solver_order=2,
            prediction_type="sample",
        )
        a_t = alpha_bar[run.visited]
        if (a_t[1:] <= ALPHA_BAR_FLOOR).any():
            raise ValueError(
                f"{self.method} cannot use schedule {schedule.name!r}, because alpha_bar falls below {ALPHA_BAR_FLOOR} "
                "before T. Use sampler ddim, or a schedule that adds less noise"
            )
        solver.sigmas = ((1 - a_t) / a_t).sqrt().to(run.z_T.dtype)
        solver.timesteps = torch.tensor(run.visited[:-1], device=run.z_T.device) - 1
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
