"""A multimodal distribution in the plane: a mixture of Gaussians, its exact denoiser, and a small trained network.

Setting: z_0 ~ sum_k w_k N(m_k, c I). Each mode stays Gaussian along the forward chain,

    q(z_t | k) = N(sqrt(a_t) m_k, (a_t c + 1 - a_t) I),

so the density q(z_t), the mode probabilities q(k | z_t) and the posterior mean E[z_0 | z_t] are known in closed form at
every t. The samples of a correct reverse chain are in each mode with a frequency equal to the weight of the mode, and
the loss of a trained network can be compared with the lowest possible loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ldm.diffusion.chain import forward_step, marginal, target, to_eps
from ldm.diffusion.denoiser import Condition, Denoiser, DenoiserLike, Prediction
from ldm.diffusion.loss import sample_timesteps, simple_loss
from ldm.diffusion.samplers.base import SamplerLike
from ldm.diffusion.schedule import NoiseSchedule, Step
from ldm.progress import progress, track
from ldm.runtime.random import derive_seed, torch_generator

SNAPSHOT_TIMES = (0, 0.08, 0.2, 0.4, 0.65, 1)
"""Times u = t / T at which snapshots of a chain are taken."""
NUM_PATHS = 60
"""Number of samples whose complete path along the reverse chain is stored."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """sum_k weights[k] N(means[k], variance I), with float64 means [k, d] and weights [k] that sum to 1."""

    means: Tensor
    weights: Tensor
    variance: float

    def sample(self, num_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw samples z_0 [n, d] in float32, and return them with the mode of each sample, [n]."""
        mode = torch.multinomial(self.weights, num_samples, replacement=True, generator=generator)
        noise = torch.randn(num_samples, self.means.shape[1], generator=generator)
        return self.means.float()[mode] + self.variance**0.5 * noise, mode

    def log_joint(self, schedule: NoiseSchedule, z_t: Float[Tensor, " b d"], t: Step) -> Float[Tensor, " b k"]:
        """Return log(w_k q(z_t | k)) for each mode k, in nats."""
        a_t = schedule.at(t, z_t)
        spread = a_t * self.variance + 1 - a_t
        normaliser = (z_t.shape[1] / 2 * (2 * torch.pi * spread).log()).to(z_t)
        centres = a_t.sqrt()[..., None].to(z_t) * self.means.to(z_t)
        distance = (z_t[:, None] - centres).square().sum(-1)
        return self.weights.log().to(z_t) - distance / (2 * spread).to(z_t) - normaliser

    def log_density(self, schedule: NoiseSchedule, z_t: Float[Tensor, " b d"], t: Step) -> Float[Tensor, " b"]:
        """Return log q(z_t), in nats."""
        return self.log_joint(schedule, z_t, t).logsumexp(-1)

    def most_likely_mode(self, schedule: NoiseSchedule, z_t: Float[Tensor, " b d"], t: Step = 0) -> Int[Tensor, " b"]:
        """Return the mode k with the largest probability q(k | z_t)."""
        return self.log_joint(schedule, z_t, t).argmax(-1)


@dataclass(frozen=True, eq=False)
class ExactDenoiser:
    """The posterior mean of a mixture, as a denoiser.

        E[z_0 | z_t] = sum_k q(k | z_t) (m_k + g (z_t - sqrt(a_t) m_k)),   g = sqrt(a_t) c / (a_t c + 1 - a_t)

    This denoiser attains the lowest possible L_simple. In the formula, c is `mixture.variance`.
    """

    schedule: NoiseSchedule
    mixture: Mixture

    def __call__(self, z_t: Float[Tensor, " b d"], t: Step, condition: Condition | None = None) -> Prediction:
        """Predict z_0 from z_t."""
        a_t = self.schedule.at(t, z_t)
        gain = a_t.sqrt() * self.mixture.variance / (a_t * self.mixture.variance + 1 - a_t)
        mean = self.mixture.log_joint(self.schedule, z_t, t).softmax(-1) @ self.mixture.means.to(z_t)
        return Prediction(mean + gain.to(z_t) * (z_t - a_t.sqrt().to(z_t) * mean), None)


def five_modes(std: float = 0.18) -> Mixture:
    """Return a mixture of five modes in the plane, numbered from left to right.

    The modes are well separated along the first axis. The mixture is centred and scaled so that both coordinates have
    mean 0 and their variances average to 1.
    """
    means = torch.tensor([[-1.6, 0.3], [-0.8, -1.1], [0.1, 1.2], [0.9, -0.3], [1.8, 1.0]], dtype=torch.float64)
    weights = torch.tensor([0.12, 0.35, 0.2, 0.25, 0.08], dtype=torch.float64)
    means = means - weights @ means
    scale = ((1 - std**2) / (weights @ means.square()).mean()).sqrt()
    return Mixture(means * scale, weights, std**2)


class SmallNetwork(nn.Module):
    """A multilayer perceptron on z_t [b, d] and a sine-cosine embedding of u = t / T."""

    frequencies: Tensor

    def __init__(self, num_steps: int, dimensions: int = 2, width: int = 128, num_frequencies: int = 6) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.register_buffer("frequencies", torch.pi / 2 * 2.0 ** torch.arange(num_frequencies))
        self.layers = nn.Sequential(
            nn.Linear(dimensions + 2 * num_frequencies, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, dimensions),
        )

    def forward(self, z_t: Tensor, timesteps: Tensor, condition: Condition | None = None) -> Tensor:
        angles = (timesteps[:, None] + 1) / self.num_steps * self.frequencies
        return self.layers(torch.cat([z_t, angles.sin(), angles.cos()], dim=1))


def train(
    mixture: Mixture,
    schedule: NoiseSchedule,
    *,
    steps: int,
    seed: int = 0,
    batch_size: int = 512,
    lr: float = 5e-3,
    device: torch.device | str = "cpu",
) -> Denoiser:
    """Train a small network on fresh samples from the mixture.

    The loss is L_simple with v-prediction. The optimiser is Adam with a learning rate that decays linearly to 0.
    """
    generator = torch_generator(seed, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, 1))
        network = SmallNetwork(schedule.num_steps, mixture.means.shape[1]).to(device)
    denoiser = Denoiser(schedule, network, "v")
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in track(range(steps), "training"):
        z_0, z_t, eps, t = _noisy_batch(mixture, schedule, batch_size, generator, device)
        output, _ = denoiser.output(z_t, t)
        loss = simple_loss(schedule, output, z_0, eps, t, "v").mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return denoiser


@torch.no_grad()
def mean_loss(denoiser: DenoiserLike, mixture: Mixture, *, seed: int = 0, device: torch.device | str = "cpu") -> float:
    """Return a denoiser's L_simple for v on 20,000 fresh samples. `ExactDenoiser` has the lowest possible loss."""
    schedule = denoiser.schedule
    z_0, z_t, eps, t = _noisy_batch(mixture, schedule, 20_000, torch_generator(seed, 2), device)
    z_0_hat = denoiser(z_t, t).z_0
    output = target(schedule, z_0_hat, to_eps(schedule, z_0_hat, z_t, t), t, "v")
    return simple_loss(schedule, output, z_0, eps, t, "v").mean().item()


def _noisy_batch(
    mixture: Mixture, schedule: NoiseSchedule, num_samples: int, generator: torch.Generator, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw samples z_0, noise eps and times t; return z_0, z_t, eps and t."""
    z_0 = mixture.sample(num_samples, generator)[0].to(device)
    eps = torch.randn(z_0.shape, generator=generator).to(device)
    t = sample_timesteps(schedule.num_steps, num_samples, generator=generator)
    return z_0, marginal(schedule, z_0, t, eps), eps, t


@dataclass(frozen=True)
class ReverseChain:
    """States of a batch of samples along the reverse chain."""

    z_0: Tensor
    """Final states, [n, d]."""
    snapshots: dict[int, Tensor]
    """States of all samples, [n, d], by t, at the times closest to SNAPSHOT_TIMES."""
    times: list[float]
    """Times t of all steps, from T down to 0."""
    paths: Tensor
    """States of the first NUM_PATHS samples at all times, [len(times), NUM_PATHS, d]."""


def run_reverse_chain(
    denoiser: DenoiserLike, sampler: SamplerLike, z_T: Tensor, generator: torch.Generator, title: str = "sampling"
) -> ReverseChain:
    """Sample from z_T with a progress bar, and record the state after each step."""
    num_steps = denoiser.schedule.num_steps
    times, states = [float(num_steps)], [z_T.cpu()]
    with progress() as bar:
        task = bar.add_task(title, total=num_steps)

        def record(s: float, z_s: Tensor, z_0: Tensor) -> None:
            times.append(s)
            states.append(z_s.cpu())
            bar.update(task, completed=num_steps - s)

        z_0 = sampler(denoiser, z_T, generator=generator, on_step=record).cpu()
    nearest = {min(range(len(times)), key=lambda i: abs(times[i] - u * num_steps)) for u in SNAPSHOT_TIMES}
    snapshots = {round(times[i]): states[i] for i in sorted(nearest, reverse=True)}
    return ReverseChain(z_0, snapshots, times, torch.stack([state[:NUM_PATHS] for state in states]))


def run_forward_chain(
    schedule: NoiseSchedule, z_0: Tensor, times: Sequence[int], generator: torch.Generator
) -> dict[int, Tensor]:
    """Sample q(z_t | z_s) along increasing times, and return the states by time, including z_0 at time 0."""
    states = {0: z_0}
    for s, t in zip([0, *times], times, strict=False):
        if t > 0:
            eps = torch.randn(z_0.shape, generator=generator)
            states[t] = forward_step(schedule, states[s], s, t, eps)
    return states
