"""What a denoiser is trained for: which loss, what the network predicts, and how t is drawn; and what goes together.

simple, min_snr   L_simple: Sigma is fixed
hybrid            L_simple + 0.001 L_vlb: L_simple moves the mean, L_vlb Sigma alone
vlb               L_vlb moves both
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, get_args

from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.chain import VarianceType, check_choice, check_prediction, marginal, to_z_0
from ldm.diffusion.denoiser import Condition, Denoiser, Prediction
from ldm.diffusion.loss import TIMESTEPS, WEIGHTINGS, hybrid_loss, simple_loss, vlb_loss
from ldm.diffusion.schedule import NoiseSchedule
from ldm.rules import Positive, apply_rules


class Denoising(NamedTuple):
    """One call of the network in training: z_t of z_0 and eps at t, and what `Denoiser.output` makes of it."""

    z_0: Tensor
    eps: Tensor
    t: Tensor
    z_t: Tensor
    output: Tensor
    v: Tensor | None

    @classmethod
    def run(
        cls, denoiser: Denoiser, z_0: Tensor, eps: Tensor, t: Tensor, condition: Condition | None = None
    ) -> "Denoising":
        """Noise z_0 to t, and call the network."""
        z_t = marginal(denoiser.schedule, z_0, t, eps)
        return cls(z_0, eps, t, z_t, *denoiser.output(z_t, t, condition))


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Args:
        loss: simple, min_snr (with `gamma`), hybrid or vlb.
        prediction: What the network outputs: eps, z_0, v or flow.
        timesteps: How t is drawn while training: uniform, logit_normal or importance.
    """

    loss: str = "simple"
    prediction: str = "v"
    timesteps: str = "uniform"
    gamma: Positive = 5.0

    def variance(self, asked: str | None) -> str:
        """Sigma to train with: what is asked for, else the network's own where the bound trains it."""
        return asked or ("fixed_small" if self.loss in WEIGHTINGS else "learned_range")

    def per_sample(self, schedule: NoiseSchedule, made: Denoising, variance: str) -> Float[Tensor, " b"]:
        """The loss of each sample; `variance` is Sigma, as `check` allows it."""
        return LOSSES[self.loss](self, schedule, made, variance)

    def simple(self, schedule: NoiseSchedule, made: Denoising, variance: str) -> Float[Tensor, " b"]:
        """L_simple per sample, weighted by min-SNR where that is the loss."""
        weighting = self.loss if self.loss in WEIGHTINGS else "simple"
        sample = (made.output, made.z_0, made.eps, made.t, self.prediction)
        return simple_loss(schedule, *sample, weighting=weighting, gamma=self.gamma)

    def vlb(self, schedule: NoiseSchedule, made: Denoising, variance: str) -> Float[Tensor, " b"]:
        """L_vlb per sample, in bits per latent dimension."""
        predicted = Prediction(to_z_0(schedule, made.output, made.z_t, made.t, self.prediction), made.v)
        return vlb_loss(schedule, predicted, made.z_0, made.t, variance)

    def hybrid(self, schedule: NoiseSchedule, made: Denoising, variance: str) -> Float[Tensor, " b"]:
        """L_hybrid per sample."""
        sample = (made.output, made.v, made.z_0, made.z_t, made.eps, made.t, self.prediction)
        return hybrid_loss(schedule, *sample)

    def check(self, variance: str, alpha_bar: Float[Tensor, "..."]) -> None:
        """Refuse choices that would train nothing, something else than they say, or what does not exist.

        Args:
            variance: Sigma that is trained with: fixed_small, fixed_large or learned_range.

        Raises:
            ValueError: saying why the choices do not go together, and what to choose.
        """
        apply_rules(Objective, vars(self))
        check_choice("objective", self.loss, tuple(LOSSES))
        check_choice("variance", variance, get_args(VarianceType))
        check_choice("timesteps", self.timesteps, TIMESTEPS)
        check_prediction(self.prediction, alpha_bar)
        if variance == "optimal":
            raise ValueError(
                "variance optimal is fitted to a trained denoiser: train with fixed_small or fixed_large, and choose "
                "optimal when sampling or measuring the bound"
            )
        if variance == "learned_range" and self.loss in WEIGHTINGS:
            raise ValueError(f"objective {self.loss} would leave the learned Sigma untrained: choose hybrid or vlb")
        if variance != "learned_range" and self.loss == "hybrid":
            raise ValueError(
                f"the VLB term of hybrid trains Sigma alone, and {variance} has nothing to train: choose variance "
                "learned_range, or objective simple"
            )
        if self.timesteps == "importance" and self.loss != "vlb":
            raise ValueError(
                f"importance draws t by the history of L_vlb, which {self.loss} does not minimise: choose timesteps "
                "uniform"
            )
        if self.timesteps == "logit_normal" and self.loss not in WEIGHTINGS:
            other = " or importance" if self.loss == "vlb" else ""
            raise ValueError(
                f"{self.loss} estimates the sum of L_vlb over all t, which logit_normal would bias: choose timesteps "
                f"uniform{other}"
            )


LOSSES: dict[str, Callable[[Objective, NoiseSchedule, Denoising, str], Tensor]] = {
    "simple": Objective.simple,
    "min_snr": Objective.simple,
    "hybrid": Objective.hybrid,
    "vlb": Objective.vlb,
}
"""The loss of each name."""
