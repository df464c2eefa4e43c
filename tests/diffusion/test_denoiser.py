import math

import pytest
import torch

from ldm.diffusion import chain
from ldm.diffusion.denoiser import Denoiser, DenoiserLike
from ldm.diffusion.schedule import linear, rectified_flow


@pytest.mark.parametrize("prediction", ["eps", "z_0", "v", "flow"])
@pytest.mark.parametrize("learned_variance", [False, True])
def test_denoiser_returns_z_0_for_every_prediction_type(prediction, learned_variance, randn):
    schedule = linear(100)
    z_0, eps, raw_v = randn(3, 2, 4, 4), randn(3, 2, 4, 4), randn(3, 2, 4, 4).tanh()
    t = torch.tensor([1, 50, 100])
    target = chain.target(schedule, z_0, eps, t, prediction)
    output = torch.cat([target, raw_v], 1) if learned_variance else target
    denoiser = Denoiser(schedule, lambda z_t, timesteps, condition: output, prediction, learned_variance)
    z_t = chain.marginal(schedule, z_0, t, eps)
    predicted = denoiser(z_t, t)
    torch.testing.assert_close(predicted.z_0, z_0, rtol=1e-9, atol=1e-9)
    assert denoiser.output(z_t, t)[0].equal(target)
    if learned_variance:
        torch.testing.assert_close(predicted.v, (raw_v + 1) / 2)
    else:
        assert predicted.v is None
    assert isinstance(denoiser, DenoiserLike)


def test_network_receives_diffusers_timesteps_and_condition():
    calls = []

    def network(z_t, timesteps, condition):
        calls.append((timesteps, condition))
        return z_t.bfloat16()

    condition = {"label": torch.tensor([3, 4])}
    denoiser = Denoiser(linear(100), network, "v")
    predicted = denoiser(torch.zeros(2, 3, 4), 100, condition)
    denoiser(torch.zeros(2, 3, 4), torch.tensor([1, 7]))
    assert predicted.z_0.dtype == torch.float32
    assert calls[0][0].dtype == torch.long
    assert [timesteps.tolist() for timesteps, _ in calls] == [[99, 99], [0, 6]]
    assert calls[0][1] is condition
    assert calls[1][1] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_fractional_t_is_passed_to_network_as_float(dtype):
    timesteps_per_call = []

    def network(z_t, timesteps, condition):
        timesteps_per_call.append(timesteps)
        return z_t * torch.cos(timesteps.double()).to(z_t)[:, None]

    denoiser, z_t = Denoiser(linear(100), network, "eps"), torch.ones(2, 3, dtype=dtype)
    z_0 = denoiser(z_t, 2.25).z_0
    denoiser(z_t, torch.tensor([1.0, 99.5]))
    assert [timesteps.tolist() for timesteps in timesteps_per_call] == [[1.25, 1.25], [0, 98.5]]
    assert all(timesteps.dtype == torch.promote_types(dtype, torch.float32) for timesteps in timesteps_per_call)
    a_t = denoiser.schedule.at(2.25, z_t).item()
    expected = (1 - (1 - a_t) ** 0.5 * math.cos(1.25)) / a_t**0.5
    torch.testing.assert_close(z_0.double(), torch.full((2, 3), expected).double(), rtol=1e-2, atol=0)
    assert denoiser(z_t, 2.0).z_0.equal(denoiser(z_t, 2).z_0)
    assert denoiser(z_t, torch.tensor([3.0, 100.0])).z_0.equal(denoiser(z_t, torch.tensor([3, 100])).z_0)


def test_invalid_arguments_raise():
    def network(z_t, timesteps, condition):
        return z_t

    z_t = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="prediction.*'epsilon'.*eps, z_0, v, flow"):
        Denoiser(linear(10), network, "epsilon")
    with pytest.raises(ValueError, match="alpha_bar = 0"):
        Denoiser(rectified_flow(10), network, "eps")
    with pytest.raises(ValueError, match=r"6 channels.*\b3\b"):
        Denoiser(linear(10), network, "v", learned_variance=True)(z_t, 1)
    with pytest.raises(ValueError, match=r"3 channels.*\b6\b"):
        Denoiser(linear(10), lambda z, t, c: torch.cat([z, z], 1), "v")(z_t, 1)
    for t in (0, 11, 10.5):
        with pytest.raises(ValueError, match=f"t = {t}"):
            Denoiser(linear(10), network, "v")(z_t, t)
    with pytest.raises(ValueError, match=r"\[1, 10\].*t = 0\.5"):
        Denoiser(linear(10), network, "v")(z_t, 0.5)
