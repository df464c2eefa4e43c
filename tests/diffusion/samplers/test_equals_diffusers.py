"""Tests of the samplers against diffusers' schedulers, with an arbitrary deterministic network."""

import diffusers
import pytest
import torch

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers.base import timesteps
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.ddpm import DDPM
from ldm.diffusion.samplers.multistep import DPMSolver, UniPC
from ldm.diffusion.schedule import linear, scaled_linear


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network(z_t, timesteps, condition):
    """Return arbitrary deterministic outputs with twice the channels of z_t, the second half in [-1, 1]."""
    phase = (timesteps / 10)[:, None, None]
    return torch.cat([torch.sin(2 * z_t + phase), torch.cos(z_t - phase)], 1)


# diffusers' DDPM adds noise in its last step unless that step starts at t = 1, so only 'leading' is comparable.
@pytest.mark.parametrize("steps", [60, 12])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_equals_diffusers(variance, steps, randn):
    schedule = linear(60, 1e-3, 0.1)
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=60,
        trained_betas=schedule.betas.tolist(),
        variance_type=variance,
        clip_sample=False,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(steps)
    is_learned = variance == "learned_range"

    def predict(z_t, timesteps, condition):
        output = network(z_t, timesteps, condition)
        return output if is_learned else output[:, : z_t.shape[1]]

    z_T = randn(3, 4, 5, dtype=torch.float32)
    samples = DDPM(steps, spacing="leading", variance=variance)(
        Denoiser(schedule, predict, "eps", is_learned), z_T, generator=seeded()
    )
    z, generator = z_T, seeded()
    for t in scheduler.timesteps:
        z = scheduler.step(predict(z, t.expand(3), None), int(t), z, generator=generator).prev_sample
    torch.testing.assert_close(samples, z, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_ddim_equals_diffusers(eta, spacing, prediction, randn):
    schedule = scaled_linear()
    scheduler = diffusers.DDIMScheduler(
        trained_betas=schedule.betas.tolist(),
        clip_sample=False,
        timestep_spacing=spacing,
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction],
    )
    scheduler.set_timesteps(20)

    def predict(z_t, timesteps, condition):
        return network(z_t, timesteps, condition)[:, : z_t.shape[1]]

    z_T = randn(3, 4, 5, dtype=torch.float32)
    samples = DDIM(20, eta=eta, spacing=spacing)(Denoiser(schedule, predict, prediction), z_T, generator=seeded())
    z, generator = z_T, seeded()
    for t in scheduler.timesteps:
        z = scheduler.step(predict(z, t.expand(3), None), int(t), z, eta=eta, generator=generator).prev_sample
    torch.testing.assert_close(samples, z, rtol=1e-3, atol=2e-3)


# diffusers' set_timesteps uses a conversion that numpy 2 deprecates; ldm does not call set_timesteps.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("sampler", [DPMSolver, UniPC])
def test_multistep_solvers_equal_diffusers(sampler, randn):
    # The solver itself comes from diffusers, so this only tests that the solver receives the same timesteps and sigmas.
    schedule = scaled_linear()
    scheduler = sampler.solver(
        trained_betas=schedule.betas.tolist(), prediction_type="sample", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(20)

    def predict(z_t, timesteps, condition):
        return network(z_t, timesteps, condition)[:, : z_t.shape[1]]

    z_T = randn(3, 4, 5, dtype=torch.float32)
    samples = sampler(20)(Denoiser(schedule, predict, "z_0"), z_T)
    z = z_T
    for t in scheduler.timesteps:
        z = scheduler.step(predict(z, t.expand(3), None), t, z).prev_sample
    torch.testing.assert_close(samples, z, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [2, 7, 20, 37, 999, 1000])
def test_timesteps_equal_diffusers_plus_one(spacing, steps):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    # For some numbers of steps, diffusers' 'trailing' timesteps end with -1 because of rounding.
    expected = [int(t) + 1 for t in scheduler.timesteps if t >= 0]
    assert timesteps(1000, steps, spacing) == [*expected, 0]
