"""The terms of the variational bound, in nats per image: the prior term L_T, the layers L_{t-1}, and the last term L_0.

Each term is summed over the dimensions of an image and computed in float64 (float32 on MPS, which has no float64).
`ldm.diffusion.bound` adds up the terms.
"""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ldm.diffusion.chain import at_least_float32, log_variance, posterior
from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.schedule import NoiseSchedule, Step


def prior_kl(schedule: NoiseSchedule, z_0: Float[Tensor, " b *z"]) -> Float[Tensor, " b"]:
    """Return L_T, the information about the image that remains at T, in nats per image.

    KL(q(z_T | z_0) || N(0, I)) = 1/2 sum(a_T z_0^2 - a_T - log(1 - a_T))
    """
    z_0 = to_float64(z_0)
    a_T = schedule.at(schedule.num_steps, z_0)
    return 0.5 * (a_T.to(z_0) * z_0.square() - (a_T + torch.log1p(-a_T)).to(z_0)).flatten(1).sum(1)


def bound_term(
    schedule: NoiseSchedule,
    prediction: Prediction,
    z_0: Float[Tensor, " b *z"],
    s: Step,
    t: Step,
    *,
    variance: str,
    z_0_mse: Float64[Tensor, " num_entries"] | None = None,
) -> Float[Tensor, " b"]:
    """Return L_s, the cost in nats per image of encoding z_s given z_t.

        s >= 1  KL(q(z_s | z_t, z_0) || p(z_s | z_t)) = 1/2 sum(bt / Sigma - 1 + log(Sigma / bt) + d^2 / Sigma)
        s = 0   -log p(z_0 | z_t)                     = 1/2 sum(log(2 pi Sigma) + d^2 / Sigma)

    where d = c_0 (z_0 - predicted z_0) is the difference between the means of q and p, whose z_t terms cancel. bt, c_0
    and Sigma are defined in `ldm.diffusion.chain`. s and t are ints, or long tensors [b] that can mix both cases. Any
    Sigma that `log_variance` supports can be used.
    Source: Ho et al. 2020, arXiv:2006.11239, eqs. 5 to 7.

    Raises:
        ValueError: if `log_variance` raises it.
    """
    v, squared_error = None, (at_least_float32(z_0) - at_least_float32(prediction.z_0)).square().flatten(1)
    if variance != "learned_range":
        # All dimensions share one Sigma, so the mean squared error of each image is sufficient.
        squared_error = squared_error.mean(1, keepdim=True)
    elif prediction.v is not None:
        v = to_float64(prediction.v).flatten(1)
    squared_error = to_float64(squared_error)
    # c_0 is the posterior mean at z_0 = 1 and z_t = 0.
    one = torch.ones_like(squared_error[:, :1])
    c_0, bt = posterior(schedule, one, torch.zeros_like(one), s, t)
    log_sigma = log_variance(schedule, s, t, variance, like=squared_error, v=v, z_0_mse=z_0_mse)
    is_last_term = bt == 0
    log_ratio = log_sigma - torch.where(is_last_term, 1.0, bt).log()
    variance_terms = torch.where(is_last_term, log_sigma + math.log(2 * math.pi), torch.expm1(-log_ratio) + log_ratio)
    return 0.5 * z_0[0].numel() * (variance_terms + c_0.square() * squared_error * (-log_sigma).exp()).mean(1)


def discretised_nll(
    x: Float[Tensor, "*x"],
    mean: Float[Tensor, "*x"],
    scale: Float[Tensor, "*#x"],
    bin_width: float,
    low: float,
    high: float,
) -> Float[Tensor, "*x"]:
    """Return -log of the Gaussian probability of the bin that contains x, in nats per dimension, for quantised images.

        P(x) = Phi((x + w/2 - mean) / scale) - Phi((x - w/2 - mean) / scale),   w = bin_width

    The outermost bins, around `low` and `high`, extend to infinity, so that P sums to one over all values. 8-bit
    pixels in [-1, 1] have w = 2 / 255, low = -1 and high = 1. The result is in float64 and remains finite far into the
    tails.
    Source: Ho et al. 2020, arXiv:2006.11239, eq. 13.

    Raises:
        ValueError: unless bin_width and every scale are positive.
    """
    x, mean, scale = to_float64(x), to_float64(mean), to_float64(scale)
    if bin_width <= 0 or not (scale > 0).all():
        raise ValueError(f"bin_width and scale must be positive; got {bin_width} and {scale.min().item()}")
    lower = torch.where(x < low + bin_width / 2, -math.inf, (x - bin_width / 2 - mean) / scale)
    upper = torch.where(x > high - bin_width / 2, math.inf, (x + bin_width / 2 - mean) / scale)
    # Phi is only accurate in its lower tail, so bins above the mean are mirrored to below the mean.
    is_mirrored = lower + upper > 0
    lower, upper = torch.where(is_mirrored, -upper, lower), torch.where(is_mirrored, -lower, upper)
    log_lower, log_upper = torch.special.log_ndtr(lower), torch.special.log_ndtr(upper)
    return -(log_upper + torch.log(-torch.expm1(log_lower - log_upper)))


def to_float64(z: Tensor) -> Tensor:
    """Convert to float64, or to float32 on MPS."""
    # The bound sums thousands of small differences of logarithms. Float32 would lose fractions of a nat.
    return at_least_float32(z) if z.device.type == "mps" else z.double()
