"""The training objective: the loss, the prediction type, the distribution of t, and the valid combinations of these.

simple, min_snr   L_simple, with a fixed Sigma
hybrid            L_simple + 0.001 L_vlb; L_simple trains the mean, L_vlb only trains Sigma
vlb               L_vlb trains both
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


class DenoisingBatch(NamedTuple):
    """A training batch noised to t, with the network's output and v from `Denoiser.output`."""

    z_0: Tensor
    eps: Tensor
    t: Tensor
    z_t: Tensor
    output: Tensor
    v: Tensor | None

    @classmethod
    def run(
        cls, denoiser: Denoiser, z_0: Tensor, eps: Tensor, t: Tensor, condition: Condition | None = None
    ) -> "DenoisingBatch":
        """Add noise to z_0 and call the network."""
        z_t = marginal(denoiser.schedule, z_0, t, eps)
        return cls(z_0, eps, t, z_t, *denoiser.output(z_t, t, condition))


@dataclass(frozen=True)
class Objective:
    """Training objective: the loss, the prediction type, and the distribution of t.

    Args:
        loss: "simple", "min_snr", "hybrid" or "vlb".
        prediction: the network's prediction type: "eps", "z_0", "v" or "flow".
        timesteps: the distribution of t in training: "uniform", "logit_normal" or "importance".
        gamma: the upper limit of the SNR weight for the "min_snr" loss; ignored by the other losses.
    """

    loss: str = "simple"
    prediction: str = "v"
    timesteps: str = "uniform"
    gamma: Positive = 5.0

    def variance(self, override: str | None) -> str:
        """Return the choice of Sigma: `override` if it is set, otherwise the default for the loss."""
        return override or ("fixed_small" if self.loss in WEIGHTINGS else "learned_range")

    def loss_per_sample(self, schedule: NoiseSchedule, batch: DenoisingBatch, variance: str) -> Float[Tensor, " b"]:
        """Return the loss of each sample; `variance` is a choice of Sigma that `check` accepts."""
        return LOSSES[self.loss](self, schedule, batch, variance)

    def simple(self, schedule: NoiseSchedule, batch: DenoisingBatch, variance: str) -> Float[Tensor, " b"]:
        """Return L_simple per sample, with min-SNR weights if the loss is "min_snr"."""
        weighting = self.loss if self.loss in WEIGHTINGS else "simple"
        sample = (batch.output, batch.z_0, batch.eps, batch.t, self.prediction)
        return simple_loss(schedule, *sample, weighting=weighting, gamma=self.gamma)

    def vlb(self, schedule: NoiseSchedule, batch: DenoisingBatch, variance: str) -> Float[Tensor, " b"]:
        """Return L_vlb per sample, in bits per latent dimension."""
        prediction = Prediction(to_z_0(schedule, batch.output, batch.z_t, batch.t, self.prediction), batch.v)
        return vlb_loss(schedule, prediction, batch.z_0, batch.t, variance)

    def hybrid(self, schedule: NoiseSchedule, batch: DenoisingBatch, variance: str) -> Float[Tensor, " b"]:
        """Return L_hybrid per sample."""
        sample = (batch.output, batch.v, batch.z_0, batch.z_t, batch.eps, batch.t, self.prediction)
        return hybrid_loss(schedule, *sample)

    def check(self, variance: str, alpha_bar: Float[Tensor, "..."]) -> None:
        """Raise an error for unknown choices or incompatible combinations.

        Args:
            variance: the choice of Sigma for training: "fixed_small", "fixed_large" or "learned_range".

        Raises:
            ValueError: explaining why a choice is unknown or incompatible, and what to choose instead.
        """
        apply_rules(Objective, vars(self))
        check_choice("objective", self.loss, tuple(LOSSES))
        check_choice("variance", variance, get_args(VarianceType))
        check_choice("timesteps", self.timesteps, TIMESTEPS)
        check_prediction(self.prediction, alpha_bar)
        if variance == "optimal":
            raise ValueError(
                "variance 'optimal' can only be fitted to a trained denoiser: train with fixed_small or fixed_large, "
                "and choose optimal when sampling or evaluating the bound"
            )
        if variance == "learned_range" and self.loss in WEIGHTINGS:
            raise ValueError(f"objective {self.loss!r} does not train a learned Sigma: choose hybrid or vlb")
        if variance != "learned_range" and self.loss == "hybrid":
            raise ValueError(
                f"the VLB term of objective 'hybrid' only trains Sigma, but variance {variance!r} is fixed: choose "
                "variance learned_range, or objective simple"
            )
        if self.timesteps == "importance" and self.loss != "vlb":
            raise ValueError(
                f"'importance' sampling of timesteps needs the history of L_vlb, which objective {self.loss!r} does "
                "not minimise: choose timesteps uniform"
            )
        if self.timesteps == "logit_normal" and self.loss not in WEIGHTINGS:
            alternative = " or importance" if self.loss == "vlb" else ""
            raise ValueError(
                f"objective {self.loss!r} estimates the sum of L_vlb over all t, which 'logit_normal' timesteps would "
                f"bias: choose timesteps uniform{alternative}"
            )


LOSSES: dict[str, Callable[[Objective, NoiseSchedule, DenoisingBatch, str], Tensor]] = {
    "simple": Objective.simple,
    "min_snr": Objective.simple,
    "hybrid": Objective.hybrid,
    "vlb": Objective.vlb,
}
"""Loss functions by name."""
