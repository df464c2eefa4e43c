"""Training objectives of the denoiser, per sample: L_simple and its weightings.

Setting: the network's output is compared with `chain.target` in the space of its own prediction. Each space's
squared error is that of z_0 times a known factor, since at a given z_t all predictions are affine in z_0:

    eps: snr        z_0: 1        v: snr + 1        flow: (alpha + sigma)^2 / sigma^2

A weighting that is stated on z_0 is divided by this factor, and then means the same in every space.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ldm.diffusion.chain import at_least_float32, check_order, check_prediction, target
from ldm.diffusion.schedule import NoiseSchedule

DISTRIBUTIONS = ("uniform", "logit_normal")
WEIGHTINGS = ("simple", "min_snr")


def sample_timesteps(
    num_steps: int,
    batch: int,
    distribution: str = "uniform",
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Int[Tensor, " b"]:
    """Draw the steps 1..T at which a batch is trained.

        uniform       every t equally likely
        logit_normal  t = ceil(u T), u = 1 / (1 + exp(-n)), n ~ N(0, 1)

    Drawn on the generator's device, so that the draws do not depend on where the result goes.
    Source: logit_normal is Esser et al. 2024, arXiv:2403.03206, section 3.1.

    Raises:
        ValueError: if `distribution` is unknown.
    """
    source = device if generator is None else generator.device
    if distribution == "uniform":
        return torch.randint(1, num_steps + 1, (batch,), generator=generator, device=source).to(device)
    if distribution == "logit_normal":
        u = torch.randn(batch, generator=generator, device=source).sigmoid()
        return (u * num_steps).ceil().long().clamp(1, num_steps).to(device)
    raise ValueError(f"unknown timestep distribution {distribution!r}; known: {', '.join(DISTRIBUTIONS)}")


def weight(
    schedule: NoiseSchedule, t: Int[Tensor, " b"], weighting: str, prediction: str, gamma: float = 5.0
) -> Float[Tensor, " b"]:
    """Weight of each sample's squared error in the space of the prediction, in float64.

        simple   1
        min_snr  min(snr, gamma) on z_0, that is: eps min(snr, gamma) / snr, v min(snr, gamma) / (snr + 1),
                 flow min(snr, gamma) sigma^2 / (alpha + sigma)^2

    Source: Hang et al. 2023, arXiv:2303.09556, eq. 8.

    Raises:
        ValueError: unless 1 <= t <= T; if `weighting` or `prediction` is unknown; if gamma is not positive;
            if the prediction is eps and the schedule ends at alpha_bar = 0.
    """
    check_order(schedule, 0, t)
    check_prediction(prediction, schedule.alpha_bar)
    if gamma <= 0:
        raise ValueError(f"gamma of min_snr must be positive; got {gamma}")
    snr = schedule.snr(t)
    if weighting == "simple":
        return torch.ones_like(snr)
    if weighting != "min_snr":
        raise ValueError(f"unknown weighting {weighting!r}; known: {', '.join(WEIGHTINGS)}")
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
    """L_simple per sample: the weighted squared error of the network's output, averaged over the dimensions.

        L = w(t) mean |output - target|^2

    `output` is the prediction alone, without v (`Denoiser.output` parts them). In float32 or better.
    Source: Ho et al. 2020, arXiv:2006.11239, eq. 14.

    Raises:
        ValueError: as `weight` does.
    """
    error = at_least_float32(output) - target(schedule, z_0, eps, t, prediction)
    return weight(schedule, t, weighting, prediction, gamma).to(error) * error.square().flatten(1).mean(1)
