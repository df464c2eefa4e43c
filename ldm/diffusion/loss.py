"""Training losses of the denoiser, per sample: L_simple and its weightings, L_vlb, and their weighted sum L_hybrid.

The network's output is compared with `chain.target` in the space of its prediction type. At a given z_t, all
predictions are affine in z_0, so the squared error in each space is the squared error in z_0 times a factor:

    eps: snr        z_0: 1        v: snr + 1        flow: (alpha + sigma)^2 / sigma^2

A weighting defined for the squared error in z_0, such as `min_snr`, is divided by this factor, which makes the
weighting equivalent in every space.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ldm.diffusion.bound_terms import bound_term
from ldm.diffusion.chain import at_least_float32, check_choice, check_order, check_prediction, target, to_z_0
from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.schedule import NoiseSchedule

DISTRIBUTIONS = ("uniform", "logit_normal")
TIMESTEPS = (*DISTRIBUTIONS, "importance")
WEIGHTINGS = ("simple", "min_snr")

VLB_WEIGHT = 0.001
"""Weight of L_vlb in L_hybrid. It is small, so that L_simple dominates the training of the network's shared layers."""


def sample_timesteps(
    num_steps: int,
    batch: int,
    distribution: str = "uniform",
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Int[Tensor, " b"]:
    """Draw training timesteps t in 1..T for a batch.

        uniform       every t is equally likely
        logit_normal  t = ceil(u T), u = 1 / (1 + exp(-n)), n ~ N(0, 1)

    t is sampled on the generator's device, so that the result does not depend on `device`.
    Source of `logit_normal`: Esser et al. 2024, arXiv:2403.03206, section 3.1.

    Raises:
        ValueError: if `distribution` is unknown.
    """
    check_choice("timestep distribution", distribution, DISTRIBUTIONS)
    source = device if generator is None else generator.device
    if distribution == "uniform":
        return torch.randint(1, num_steps + 1, (batch,), generator=generator, device=source).to(device)
    u = torch.randn(batch, generator=generator, device=source).sigmoid()
    return (u * num_steps).ceil().long().clamp(1, num_steps).to(device)


def weight(
    schedule: NoiseSchedule, t: Int[Tensor, " b"], weighting: str, prediction: str, gamma: float = 5.0
) -> Float[Tensor, " b"]:
    """Return the weight of each sample's squared error in the space of the prediction type, in float64.

        simple   1 for every prediction type
        min_snr  z_0: min(snr, gamma)                  eps: min(snr, gamma) / snr
                 v: min(snr, gamma) / (snr + 1)        flow: min(snr, gamma) sigma^2 / (alpha + sigma)^2

    Source: Hang et al. 2023, arXiv:2303.09556, eq. 8.

    Raises:
        ValueError: if t is not in 1..T, if `weighting` or `prediction` is unknown, if gamma is not positive, or if
            `prediction` is "eps" and the schedule ends at alpha_bar = 0.
    """
    check_order(schedule, 0, t)
    check_prediction(prediction, schedule.alpha_bar)
    check_choice("weighting", weighting, WEIGHTINGS)
    if gamma <= 0:
        raise ValueError(f"gamma must be positive; got {gamma}")
    snr = schedule.snr(t)
    if weighting == "simple":
        return torch.ones_like(snr)
    # (alpha + sigma) / sigma = sqrt(snr) + 1.
    factor = {"eps": snr, "z_0": torch.ones_like(snr), "v": snr + 1, "flow": (snr.sqrt() + 1) ** 2}[prediction]
    return snr.clamp(max=gamma) / factor


def simple_loss(
    schedule: NoiseSchedule,
    output: Float[Tensor, " b *z"],
    z_0: Float[Tensor, " b *z"],
    eps: Float[Tensor, " b *z"],
    t: Int[Tensor, " b"],
    prediction: str,
    *,
    weighting: str = "simple",
    gamma: float = 5.0,
) -> Float[Tensor, " b"]:
    """Return L_simple per sample: the weighted squared error of the network's output, averaged over dimensions.

        L = w(t) mean |output - target|^2

    `output` is the network's prediction without the variance output v (`Denoiser.output` separates the two). The result
    is in float32 or better.
    Source: Ho et al. 2020, arXiv:2006.11239, eq. 14.

    Raises:
        ValueError: as raised by `weight`.
    """
    error = at_least_float32(output) - target(schedule, z_0, eps, t, prediction)
    return weight(schedule, t, weighting, prediction, gamma).to(error) * error.square().flatten(1).mean(1)


def vlb_loss(
    schedule: NoiseSchedule,
    prediction: Prediction,
    z_0: Float[Tensor, " b *z"],
    t: Int[Tensor, " b"],
    variance: str,
) -> Float[Tensor, " b"]:
    """Return L_vlb per sample, in bits per latent dimension:  T L_{t-1} / (D ln 2).

    The mean of L_vlb over uniform t is the bound without L_T, which has no trainable parameters. The result is in
    float64.
    Source: Nichol and Dhariwal 2021, arXiv:2102.09672, eqs. 3 to 7.

    Raises:
        ValueError: as raised by `bound_term`.
    """
    nats = bound_term(schedule, prediction, z_0, t - 1, t, variance=variance)
    return schedule.num_steps / (z_0[0].numel() * math.log(2)) * nats


def hybrid_loss(
    schedule: NoiseSchedule,
    output: Float[Tensor, " b *z"],
    v: Float[Tensor, " b *z"] | None,
    z_0: Float[Tensor, " b *z"],
    z_t: Float[Tensor, " b *z"],
    eps: Float[Tensor, " b *z"],
    t: Int[Tensor, " b"],
    prediction: str,
) -> Float[Tensor, " b"]:
    """Return L_hybrid = L_simple + 0.001 L_vlb per sample, for a learned Sigma.

    L_vlb uses a detached mean, so it only trains v. t must be uniform; otherwise, L_vlb would be biased. `output` and v
    come from `Denoiser.output`.
    Source: Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 16.

    Raises:
        ValueError: as raised by `simple_loss` and `vlb_loss`.
    """
    simple = simple_loss(schedule, output, z_0, eps, t, prediction)
    fixed_mean = Prediction(to_z_0(schedule, output.detach(), z_t, t, prediction), v)
    return simple + VLB_WEIGHT * vlb_loss(schedule, fixed_mean, z_0, t, "learned_range").to(simple)


class ImportanceTimesteps(nn.Module):
    """Importance sampling of t in proportion to the magnitude of L_vlb, which varies by orders of magnitude over t.

        p_t = 0.999 sqrt(E[L^2]) / sum_t sqrt(E[L^2]) + 0.001 / T,   w = 1 / (T p_t)

    L is the L_vlb of a sample, and E[L^2] is the mean over the last 10 losses at t. Until every t has 10 losses, p is
    uniform. This phase takes at least 10 T draws (about 25 T for T = 1000). With the loss weights w, the expected loss
    equals the mean of L over all t. The history of losses is stored in buffers, so it is part of every checkpoint. In
    distributed training, call `update` on each rank with the losses of all ranks.
    Source: Nichol and Dhariwal 2021, arXiv:2102.09672, section 3.3; the uniform share is from the authors' code.
    """

    history: Tensor
    counts: Tensor

    history_length = 10
    uniform_share = 0.001

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.register_buffer("history", torch.zeros(num_steps, self.history_length))
        self.register_buffer("counts", torch.zeros(num_steps, dtype=torch.long))

    def probabilities(self) -> Float[Tensor, " num_steps"]:
        """Return p_t for t = 1..T."""
        rms = self.history.square().mean(1).sqrt()
        uniform = torch.full_like(rms, 1 / len(rms))
        proportional = torch.where(self.counts.min() >= self.history_length, rms / rms.sum(), uniform)
        return (1 - self.uniform_share) * proportional + self.uniform_share * uniform

    def sample(
        self, batch: int, generator: torch.Generator | None = None
    ) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
        """Draw t in 1..T on the generator's device; return t and the loss weights w on the buffers' device."""
        p = self.probabilities()
        source = p if generator is None else p.to(generator.device)
        index = torch.multinomial(source, batch, replacement=True, generator=generator).to(p.device)
        return index + 1, self.weights(index + 1)

    def weights(self, t: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Return the loss weights w at t."""
        p = self.probabilities()
        return 1 / (len(p) * p[t - 1])

    @torch.no_grad()
    def update(self, t: Int[Tensor, " b"], losses: Float[Tensor, " b"]) -> None:
        """Record the unweighted L_vlb of each sample, as returned by `vlb_loss`.

        Raises:
            ValueError: if a loss is not finite.
        """
        if not losses.isfinite().all():
            raise ValueError("importance sampling of t received a loss that is not finite")
        t, order = t.to(self.counts.device).sort(stable=True)
        new_counts = torch.bincount(t - 1, minlength=len(self.counts))
        position = torch.arange(len(t), device=t.device) - (new_counts.cumsum(0) - new_counts)[t - 1]
        # If there are more than 10 losses at one t, only the last 10 are stored, each in its own slot.
        is_recent = position >= new_counts[t - 1] - self.history_length
        slot = (self.counts[t - 1] + position) % self.history_length
        self.history[(t - 1)[is_recent], slot[is_recent]] = losses.to(self.history)[order][is_recent]
        self.counts += new_counts
