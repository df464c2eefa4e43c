"""The Gaussian Markov chain: forward steps, the posterior, the reverse variance Sigma, and the prediction types.

Notation: z_t = alpha z_0 + sigma eps, where alpha = sqrt(a_t), sigma = sqrt(1 - a_t), eps ~ N(0, I). For any
s < t,

    b  = 1 - a_t / a_s                    variance of the forward step from s to t    (beta_t if s = t - 1)
    bt = b (1 - a_s) / (1 - a_t)          variance of the posterior q(z_s | z_t, z_0) (beta-tilde_t if s = t - 1)

s and t are ints, or long tensors [b] with one step per sample. Keep these tensors on the CPU, so that checking them
does not synchronise with an accelerator. All results are in float32 or better: half-precision inputs are converted
to float32 first.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ldm.diffusion.portable import output_to_z_0
from ldm.diffusion.schedule import NoiseSchedule, Step, step_tensor

PredictionType = Literal["eps", "z_0", "v", "flow"]
VarianceType = Literal["fixed_small", "fixed_large", "learned_range", "optimal"]


def at_least_float32(z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Convert half precision to float32; leave float32 and float64 unchanged."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise an error if an option has an unknown value.

    Raises:
        ValueError: listing the valid choices.
    """
    if value not in choices:
        raise ValueError(f"unknown {option} {value!r}; choose one of: {', '.join(choices)}")


def check_prediction(prediction: str, alpha_bar: Float[Tensor, "..."]) -> None:
    """Raise an error for an unknown prediction type, or for eps-prediction where z_t contains no signal.

    Raises:
        ValueError: if `prediction` is unknown, or if it is "eps" and an entry of alpha_bar is 0.
    """
    check_choice("prediction", prediction, get_args(PredictionType))
    if prediction == "eps" and (alpha_bar == 0).any():
        raise ValueError("predicting eps does not determine z_0 where alpha_bar = 0. Predict z_0, v or flow instead")


def marginal(
    schedule: NoiseSchedule, z_0: Float[Tensor, " b *z"], t: Step, eps: Float[Tensor, " b *z"]
) -> Float[Tensor, " b *z"]:
    """Draw from q(z_t | z_0):  z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) eps.

    Source: Ho et al. 2020, arXiv:2006.11239, eq. 4.

    Raises:
        ValueError: unless 0 <= t <= T.
    """
    z_0 = at_least_float32(z_0)
    alpha, sigma = _alpha_sigma(schedule, t, z_0)
    return alpha * z_0 + sigma * eps


def forward_step(
    schedule: NoiseSchedule, z_s: Float[Tensor, " b *z"], s: Step, t: Step, eps: Float[Tensor, " b *z"]
) -> Float[Tensor, " b *z"]:
    """Draw from q(z_t | z_s):  z_t = sqrt(a_t / a_s) z_s + sqrt(b) eps.

    Source: Ho et al. 2020, arXiv:2006.11239, eq. 2, for any s < t.

    Raises:
        ValueError: unless 0 <= s < t <= T.
    """
    check_order(schedule, s, t)
    z_s = at_least_float32(z_s)
    ratio = schedule.at(t, z_s) / schedule.at(s, z_s)
    return ratio.sqrt().to(z_s) * z_s + (1 - ratio).sqrt().to(z_s) * eps


def posterior(
    schedule: NoiseSchedule, z_0: Float[Tensor, " b *z"], z_t: Float[Tensor, " b *z"], s: Step, t: Step
) -> tuple[Float[Tensor, " b *z"], Float[Tensor, " _ *_"]]:
    """Return the mean and variance of q(z_s | z_t, z_0).

        mean     = sqrt(a_s) b / (1 - a_t) z_0 + sqrt(a_t / a_s) (1 - a_s) / (1 - a_t) z_t
        variance = bt, of shape [b or 1, 1, ..., 1]; exactly 0 at s = 0

    Source: Ho et al. 2020, arXiv:2006.11239, eqs. 6 and 7, for any s < t.

    Raises:
        ValueError: unless 0 <= s < t <= T.
    """
    check_order(schedule, s, t)
    z_0 = at_least_float32(z_0)
    a_s, a_t = schedule.at(s, z_0), schedule.at(t, z_0)
    _, bt = _step_variances(a_s, a_t)
    z_0_weight, z_t_weight = _posterior_weights(a_s, a_t)
    return z_0_weight.to(z_0) * z_0 + z_t_weight.to(z_0) * z_t, bt.to(z_0)


def log_variance(
    schedule: NoiseSchedule,
    s: Step,
    t: Step,
    variance: str,
    *,
    like: Float[Tensor, " b *z"],
    v: Float[Tensor, " b *z"] | None = None,
    z_0_mse: Float64[Tensor, " num_entries"] | None = None,
) -> Float[Tensor, " _ *_"]:
    """Return log Sigma(s, t, v) of the reverse step p(z_s | z_t), broadcastable to `like`.

        fixed_large    log b
        fixed_small    log bt
        learned_range  v log b + (1 - v) log bt,   v in [0, 1] if the network's output is in [-1, 1]
        optimal        log (bt + c_0^2 mse(t)),    c_0 = sqrt(a_s) b / (1 - a_t),  mse(t) = z_0_mse[t]

    `optimal` is the isotropic Sigma that minimises the mean KL divergence of each step for this denoiser, even if the
    denoiser is inexact. The means of q(z_s | z_t, z_0) and p(z_s | z_t) differ by c_0 (z_0 - predicted z_0), so per
    dimension

        E KL = 1/2 (log Sigma - log bt + (bt + c_0^2 mse(t)) / Sigma - 1),
        mse(t) = E |z_0 - predicted z_0|^2 / D.

    At s = 0, bt = 0 and c_0 = 1. `optimal` is then mse(t), which minimises the mean of -log p(z_0 | z_t). `fixed_small`
    and `learned_range` replace bt = 0 with the bt of the full chain's step from t = 2 to s = 1. The result has shape
    [b or 1, 1, ..., 1], or the shape of v for `learned_range`.
    Source: Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 15, including the clipping at the last step. `optimal` is
    from Bao et al. 2022, arXiv:2201.06503, for an exact denoiser, and arXiv:2206.07309 for any denoiser.

    Args:
        z_0_mse: mse(t) for t = 0..T, only used by `optimal`; see `check_z_0_mse`.

    Raises:
        ValueError: if 0 <= s < t <= T does not hold, if `variance` is unknown, if v is missing for `learned_range` or
            z_0_mse for `optimal`, or if bt is needed at s = 0 but the chain has only one step.
    """
    check_order(schedule, s, t)
    check_choice("variance", variance, get_args(VarianceType))
    like = at_least_float32(like)
    a_s, a_t = schedule.at(s, like), schedule.at(t, like)
    b, bt = _step_variances(a_s, a_t)
    if variance == "fixed_large":
        return b.log().to(like)
    if variance == "optimal":
        z_0_weight, _ = _posterior_weights(a_s, a_t)
        return (bt + z_0_weight**2 * _z_0_mse_at(schedule, z_0_mse, t).reshape(z_0_weight.shape)).log().to(like)
    if (bt == 0).any():
        if schedule.num_steps < 2:
            raise ValueError(
                f"variance {variance!r} needs at least two steps, but this chain has only one step. Use fixed_large"
            )
        bt = torch.where(bt == 0, _step_variances(schedule.at(1, like), schedule.at(2, like))[1], bt)
    if variance == "fixed_small":
        return bt.log().to(like)
    if v is None:
        raise ValueError(
            "variance 'learned_range' needs v, but the denoiser returned no v. Use a network that learns the variance, "
            "or choose fixed_small or fixed_large"
        )
    v = at_least_float32(v)
    return v * b.log().to(v) + (1 - v) * bt.log().to(v)


def check_z_0_mse(schedule: NoiseSchedule, z_0_mse: Float64[Tensor, " num_entries"]) -> None:
    """Raise an error if z_0_mse is not a valid table of mse(t) = E |z_0 - predicted z_0|^2 / D for t = 0..T.

    Raises:
        ValueError: unless z_0_mse has T + 1 finite entries, which are 0 at t = 0 and positive elsewhere.
    """
    if len(z_0_mse) != schedule.num_steps + 1:
        raise ValueError(
            f"z_0_mse must have T + 1 = {schedule.num_steps + 1} entries; got {len(z_0_mse)}. Fit z_0_mse on the "
            "training split, with the same noise schedule"
        )
    is_bad = ~(z_0_mse.isfinite() & (z_0_mse > 0))
    is_bad[0] = z_0_mse[0] != 0
    if is_bad.any():
        t = int(is_bad.nonzero()[0])
        raise ValueError(
            f"z_0_mse must be 0 at t = 0, and finite and positive elsewhere; got z_0_mse[{t}] = {z_0_mse[t].item()}. "
            "Fit z_0_mse on the training split"
        )


def target(
    schedule: NoiseSchedule,
    z_0: Float[Tensor, " b *z"],
    eps: Float[Tensor, " b *z"],
    t: Step,
    prediction: str,
) -> Float[Tensor, " b *z"]:
    """Return the network's training target at t, which depends on the prediction type.

        eps: eps        z_0: z_0        v: alpha eps - sigma z_0        flow: eps - z_0

    Source: Salimans and Ho 2022, arXiv:2202.00512, appendix D, for v; Liu et al. 2023, arXiv:2209.03003, for flow.

    Raises:
        ValueError: if `prediction` is unknown, if it is "eps" and a_t = 0, or if t is not in 0..T.
    """
    z_0, eps = at_least_float32(z_0), at_least_float32(eps)
    check_prediction(prediction, schedule.at(t, z_0))
    if prediction == "eps":
        return eps
    if prediction == "z_0":
        return z_0
    if prediction == "flow":
        return eps - z_0
    alpha, sigma = _alpha_sigma(schedule, t, z_0)
    return alpha * eps - sigma * z_0


def to_z_0(
    schedule: NoiseSchedule,
    output: Float[Tensor, " b *z"],
    z_t: Float[Tensor, " b *z"],
    t: Step,
    prediction: str,
) -> Float[Tensor, " b *z"]:
    """Convert a network's output at z_t to the clean latent that it implies; see `output_to_z_0`.

    Raises:
        ValueError: if `prediction` is unknown, if it is "eps" and a_t = 0, or if t is not in 0..T.
    """
    output, z_t = at_least_float32(output), at_least_float32(z_t)
    check_prediction(prediction, schedule.at(t, z_t))
    return output_to_z_0(output, z_t, schedule.at(t, z_t), prediction)


def to_eps(
    schedule: NoiseSchedule, z_0: Float[Tensor, " b *z"], z_t: Float[Tensor, " b *z"], t: Step
) -> Float[Tensor, " b *z"]:
    """Return the noise in z_t, given z_0:  eps = (z_t - alpha z_0) / sigma.

    Raises:
        ValueError: unless 1 <= t <= T; there is no noise at t = 0.
    """
    check_order(schedule, 0, t)
    z_t = at_least_float32(z_t)
    alpha, sigma = _alpha_sigma(schedule, t, z_t)
    return (z_t - alpha * z_0) / sigma


def score(
    schedule: NoiseSchedule, z_0: Float[Tensor, " b *z"], z_t: Float[Tensor, " b *z"], t: Step
) -> Float[Tensor, " b *z"]:
    """Return the score implied by a predicted z_0:  grad log q(z_t) = -eps / sqrt(1 - a_t).

    Source: Song et al. 2021, arXiv:2011.13456; exact if z_0 = E[z_0 | z_t] (Tweedie's formula).

    Raises:
        ValueError: unless 1 <= t <= T.
    """
    eps = to_eps(schedule, z_0, z_t, t)
    return -eps / _alpha_sigma(schedule, t, eps)[1]


def check_order(schedule: NoiseSchedule, s: Step, t: Step) -> None:
    """Raise an error unless 0 <= s < t <= T.

    Raises:
        ValueError: naming s, t and T.
    """
    earlier, later = step_tensor(s), step_tensor(t)
    if not ((earlier >= 0) & (earlier < later) & (later <= schedule.num_steps)).all():
        raise ValueError(f"steps must satisfy 0 <= s < t <= T = {schedule.num_steps}; got s = {s}, t = {t}")


def _alpha_sigma(schedule: NoiseSchedule, t: Step, like: Tensor) -> tuple[Tensor, Tensor]:
    a_t = schedule.at(t, like)
    return a_t.sqrt().to(like), (1 - a_t).sqrt().to(like)


def _step_variances(a_s: Tensor, a_t: Tensor) -> tuple[Tensor, Tensor]:
    b = 1 - a_t / a_s
    return b, b * (1 - a_s) / (1 - a_t)


def _posterior_weights(a_s: Tensor, a_t: Tensor) -> tuple[Tensor, Tensor]:
    z_0_weight = a_s.sqrt() * (1 - a_t / a_s) / (1 - a_t)
    return z_0_weight, (a_t / a_s).sqrt() * (1 - a_s) / (1 - a_t)


def _z_0_mse_at(schedule: NoiseSchedule, z_0_mse: Tensor | None, t: Step) -> Tensor:
    if z_0_mse is None:
        raise ValueError(
            "variance 'optimal' needs z_0_mse, the denoiser's mean squared error in z_0 at each t. Fit z_0_mse on the "
            "training split"
        )
    check_z_0_mse(schedule, z_0_mse)
    index = torch.as_tensor(t)
    if index.is_floating_point():
        raise ValueError(f"variance 'optimal' is only defined for integers t in 1..T; got t = {t}")
    return z_0_mse.to(schedule.alpha_bar.device)[index.to(schedule.alpha_bar.device)]
