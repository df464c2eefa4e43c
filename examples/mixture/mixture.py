"""Many modes in a space that can be drawn: a mixture of Gaussians, its exact denoiser and a trained network.

Setting: z_0 ~ sum_k w_k N(m_k, c I). Every mode stays Gaussian on its way down the forward chain,

    q(z_t | k) = N(sqrt(a_t) m_k, (a_t c + 1 - a_t) I),

so q(z_t), the share q(k | z_t) of each mode in a point and E[z_0 | z_t] are known at every t. A chain that is
right takes noise into every mode, as often as its weight says; a network is measured against that truth.
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

FRAMES = (0, 0.08, 0.2, 0.4, 0.65, 1)
"""u = t / T at which a chain is looked at."""
PATHS = 60
"""How many ways down the chain are kept whole."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """sum_k weights[k] N(means[k], variance I), with means [k, d] and weights [k] in float64, whose sum is 1."""

    means: Tensor
    weights: Tensor
    variance: float

    def sample(self, num_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw z_0 [n, d] in float32, and the mode [n] that each comes from."""
        mode = torch.multinomial(self.weights, num_samples, replacement=True, generator=generator)
        noise = torch.randn(num_samples, self.means.shape[1], generator=generator)
        return self.means.float()[mode] + self.variance**0.5 * noise, mode

    def log_joint(self, schedule: NoiseSchedule, z_t: Float[Tensor, " b d"], t: Step) -> Float[Tensor, " b k"]:
        """log of w_k q(z_t | k), in nats."""
        a_t = schedule.at(t, z_t)
        spread = a_t * self.variance + 1 - a_t
        normaliser = (z_t.shape[1] / 2 * (2 * torch.pi * spread).log()).to(z_t)
        centres = a_t.sqrt()[..., None].to(z_t) * self.means.to(z_t)
        distance = (z_t[:, None] - centres).square().sum(-1)
        return self.weights.log().to(z_t) - distance / (2 * spread).to(z_t) - normaliser

    def log_density(self, schedule: NoiseSchedule, z_t: Float[Tensor, " b d"], t: Step) -> Float[Tensor, " b"]:
        """log q(z_t), in nats."""
        return self.log_joint(schedule, z_t, t).logsumexp(-1)

    def mode_of(self, schedule: NoiseSchedule, z_t: Float[Tensor, " b d"], t: Step = 0) -> Int[Tensor, " b"]:
        """The mode with the largest share q(k | z_t)."""
        return self.log_joint(schedule, z_t, t).argmax(-1)


@dataclass(frozen=True, eq=False)
class ExactDenoiser:
    """The posterior mean of a mixture.

        E[z_0 | z_t] = sum_k q(k | z_t) (m_k + g (z_t - sqrt(a_t) m_k)),   g = sqrt(a_t) c / (a_t c + 1 - a_t)

    No network has a lower L_simple.
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
    """Five modes in the plane, numbered from left to right, apart from each other on the first axis alone.

    Centred and scaled, so that a coordinate has mean 0 and, over both axes, variance 1.
    """
    means = torch.tensor([[-1.6, 0.3], [-0.8, -1.1], [0.1, 1.2], [0.9, -0.3], [1.8, 1.0]], dtype=torch.float64)
    weights = torch.tensor([0.12, 0.35, 0.2, 0.25, 0.08], dtype=torch.float64)
    means = means - weights @ means
    scale = ((1 - std**2) / (weights @ means.square()).mean()).sqrt()
    return Mixture(means * scale, weights, std**2)


class SmallNetwork(nn.Module):
    """A perceptron on z_t [b, d] beside sines and cosines of u = t / T."""

    rates: Tensor

    def __init__(self, num_steps: int, dimensions: int = 2, width: int = 128, frequencies: int = 6) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.register_buffer("rates", torch.pi / 2 * 2.0 ** torch.arange(frequencies))
        self.layers = nn.Sequential(
            nn.Linear(dimensions + 2 * frequencies, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, dimensions),
        )

    def forward(self, z_t: Tensor, timesteps: Tensor, condition: Condition | None = None) -> Tensor:
        angles = (timesteps[:, None] + 1) / self.num_steps * self.rates
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
    """Train a small network on fresh draws of the mixture: L_simple in v, Adam with a rate that falls to 0."""
    generator = torch_generator(seed, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, 1))
        network = SmallNetwork(schedule.num_steps, mixture.means.shape[1]).to(device)
    denoiser = Denoiser(schedule, network, "v")
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in track(range(steps), "training"):
        z_0, z_t, eps, t = _noised(mixture, schedule, batch_size, generator, device)
        output, _ = denoiser.output(z_t, t)
        loss = simple_loss(schedule, output, z_0, eps, t, "v").mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return denoiser


@torch.no_grad()
def mean_loss(denoiser: DenoiserLike, mixture: Mixture, *, seed: int = 0, device: torch.device | str = "cpu") -> float:
    """L_simple in v over fresh draws, of whatever answers with z_0; the exact denoiser's is the least there is."""
    schedule = denoiser.schedule
    z_0, z_t, eps, t = _noised(mixture, schedule, 20_000, torch_generator(seed, 2), device)
    predicted = denoiser(z_t, t).z_0
    output = target(schedule, predicted, to_eps(schedule, predicted, z_t, t), t, "v")
    return simple_loss(schedule, output, z_0, eps, t, "v").mean().item()


def _noised(
    mixture: Mixture, schedule: NoiseSchedule, batch: int, generator: torch.Generator, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws of z_0, z_t, eps and t."""
    z_0 = mixture.sample(batch, generator)[0].to(device)
    eps = torch.randn(z_0.shape, generator=generator).to(device)
    t = sample_timesteps(schedule.num_steps, batch, generator=generator)
    return z_0, marginal(schedule, z_0, t, eps), eps, t


@dataclass(frozen=True)
class Descent:
    """A way down the reverse chain: where it ended, all points at some t, and the first points at every t.

    z_0 [n, d]; frames {t: [n, d]}; steps are the t visited, from T down to 0, and paths [len(steps), PATHS, d].
    """

    z_0: Tensor
    frames: dict[int, Tensor]
    steps: list[float]
    paths: Tensor


def descend(
    denoiser: DenoiserLike, sampler: SamplerLike, z_T: Tensor, generator: torch.Generator, title: str = "sampling"
) -> Descent:
    """Take z_T down with a progress bar, and keep what a picture of it needs."""
    num_steps = denoiser.schedule.num_steps
    steps, states = [float(num_steps)], [z_T.cpu()]
    with progress() as bar:
        task = bar.add_task(title, total=num_steps)

        def keep(s: float, z_s: Tensor, z_0: Tensor) -> None:
            steps.append(s)
            states.append(z_s.cpu())
            bar.update(task, completed=num_steps - s)

        z_0 = sampler(denoiser, z_T, generator=generator, on_step=keep).cpu()
    nearest = {min(range(len(steps)), key=lambda i: abs(steps[i] - u * num_steps)) for u in FRAMES}
    frames = {round(steps[i]): states[i] for i in sorted(nearest, reverse=True)}
    return Descent(z_0, frames, steps, torch.stack([state[:PATHS] for state in states]))


def ascend(schedule: NoiseSchedule, z_0: Tensor, steps: Sequence[int], generator: torch.Generator) -> dict[int, Tensor]:
    """Take z_0 up the forward chain through the given steps, one draw of q(z_t | z_s) after the other."""
    frames = {0: z_0}
    for s, t in zip([0, *steps], steps, strict=False):
        if t > 0:
            eps = torch.randn(z_0.shape, generator=generator)
            frames[t] = forward_step(schedule, frames[s], s, t, eps)
    return frames
