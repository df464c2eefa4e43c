"""Fixtures for data whose exact denoiser, the posterior mean E[z_0 | z_t], is known in closed form."""

import pytest
import torch

from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.schedule import NoiseSchedule


class ExactMixture:
    """Exact denoiser for z_0 ~ sum_k weights[k] N(means[k], variance I), with means [k, d] and z [b, d]."""

    def __init__(self, schedule: NoiseSchedule, means, weights=(1.0,), variance: float = 0.1) -> None:
        self.schedule = schedule
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.variance = variance

    def log_joint(self, z_t, t):
        """Return log(weights[k] q(z_t | mode k)), of shape [b, k]."""
        a = self.schedule.at(t, z_t)
        variance_t = a * self.variance + 1 - a
        distance = (z_t[:, None] - a.sqrt()[..., None] * self.means.to(z_t)).square().sum(-1)
        d = z_t.shape[1]
        return self.weights.log() - distance / (2 * variance_t) - d / 2 * (2 * torch.pi * variance_t).log()

    def __call__(self, z_t, t, condition=None) -> Prediction:
        a = self.schedule.at(t, z_t)
        gain = (a.sqrt() * self.variance / (a * self.variance + 1 - a)).to(z_t)
        responsibilities = self.log_joint(z_t, t).softmax(-1).to(z_t)
        mean = responsibilities @ self.means.to(z_t)
        return Prediction(mean + gain * (z_t - a.sqrt().to(z_t) * mean), None)


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread, because more threads make operations on small tensors ten times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def exact_mixture():
    return ExactMixture


@pytest.fixture
def exact_gaussian():
    """Return a function that builds the exact denoiser of N(mean, variance I) in `dimensions` dimensions."""

    def build(schedule, mean: float, variance: float, dimensions: int = 1):
        return ExactMixture(schedule, [[mean] * dimensions], (1.0,), variance)

    return build


@pytest.fixture
def randn():
    """Return a function that draws from N(0, I) with a fixed seed, in float64 by default."""
    generator = torch.Generator().manual_seed(20)

    def draw(*shape, dtype=torch.float64):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return draw
