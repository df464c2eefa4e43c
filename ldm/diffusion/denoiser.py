"""Denoisers, which convert the output of a network into a prediction of z_0, and of v if Sigma is learned."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.chain import at_least_float32, check_order, check_prediction, to_z_0
from ldm.diffusion.schedule import NoiseSchedule, Step

Condition = dict[str, Tensor]
"""The conditioning inputs of a network: batch-first tensors by name."""


class Prediction(NamedTuple):
    """The output of a denoiser: the predicted z_0, and the v of a learned Sigma (None if Sigma is not learned)."""

    z_0: Tensor
    v: Tensor | None


@runtime_checkable
class DenoiserLike(Protocol):
    """Anything that a sampler can call: a denoiser, a wrapped denoiser, or an exact posterior mean."""

    @property
    def schedule(self) -> NoiseSchedule: ...

    def __call__(self, z_t: Tensor, t: Step, condition: Condition | None = None) -> Prediction: ...


class Denoiser:
    """A network with its noise schedule; calling it predicts z_0.

    >>> import torch
    >>> from ldm import Denoiser, cosine
    >>> schedule = cosine(1000)
    >>> denoiser = Denoiser(schedule, lambda z_t, timestep, condition: torch.zeros_like(z_t), prediction="eps")
    >>> z_t = torch.ones(1, 4, 8, 8)
    >>> z_0 = denoiser(z_t, 500).z_0  # a network that predicts eps = 0 implies z_t = sqrt(alpha_bar) z_0
    >>> torch.allclose(z_0, z_t / schedule.alpha_bar[500].sqrt().float())
    True

    Args:
        schedule: the noise schedule that the network is trained with.
        network: called as network(z_t, timesteps, condition) with timesteps = t - 1 in 0..T-1, a long tensor
            [b]. These timesteps have the same meaning as in diffusers, so weights can be exchanged with diffusers. For
            a real-valued t, the timesteps are a float tensor, in float32 or better.
        prediction: the network's prediction type: eps, z_0, v or flow.
        learned_variance: if True, the network outputs 2C channels for latents with C channels. The second half of the
            output, in [-1, 1], is converted to v = (out + 1) / 2 (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 15).

    Raises:
        ValueError: if `prediction` is unknown, or if it is "eps" and the schedule ends at alpha_bar = 0.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        network: Callable[[Tensor, Tensor, Condition | None], Tensor],
        prediction: str,
        learned_variance: bool = False,
    ) -> None:
        check_prediction(prediction, schedule.alpha_bar)
        self.schedule = schedule
        self.network = network
        self.prediction = prediction
        self.learned_variance = learned_variance

    def __call__(self, z_t: Float[Tensor, " b c *hw"], t: Step, condition: Condition | None = None) -> Prediction:
        """Predict z_0 from z_t.

        Raises:
            ValueError: as raised by `output`.
        """
        output, v = self.output(z_t, t, condition)
        return Prediction(to_z_0(self.schedule, output, z_t, t, self.prediction), v)

    def output(
        self, z_t: Float[Tensor, " b c *hw"], t: Step, condition: Condition | None = None
    ) -> tuple[Float[Tensor, " b c *hw"], Float[Tensor, " b c *hw"] | None]:
        """Return the network's raw prediction, which approximates `chain.target`, and its v, both in float32 or better.

        Raises:
            ValueError: if t is not in [1, T], or if the network does not output C channels (2C if it learns the
                variance).
        """
        check_order(self.schedule, 0, t)
        is_real = t.is_floating_point() if isinstance(t, Tensor) else isinstance(t, float)
        dtype = torch.promote_types(z_t.dtype, torch.float32) if is_real else None
        timesteps = (torch.as_tensor(t, dtype=dtype, device=z_t.device) - 1).expand(len(z_t))
        output = at_least_float32(self.network(z_t, timesteps, condition))
        channels = 2 * z_t.shape[1] if self.learned_variance else z_t.shape[1]
        if output.shape[1] != channels:
            raise ValueError(
                f"the network must output {channels} channels, for latents with {z_t.shape[1]} channels and "
                f"{'a learned' if self.learned_variance else 'no learned'} variance; got {output.shape[1]}"
            )
        if not self.learned_variance:
            return output, None
        prediction, v = output.chunk(2, dim=1)
        return prediction, (v + 1) / 2
