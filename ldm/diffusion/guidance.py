"""Classifier-free guidance, which pushes the conditional prediction away from the unconditional prediction."""

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Condition, DenoiserLike, Prediction
from ldm.diffusion.schedule import NoiseSchedule, Step


class Guided:
    """A denoiser with classifier-free guidance, called like any other denoiser.

    >>> import torch
    >>> from ldm import Denoiser, Guided, cosine
    >>> denoiser = Denoiser(cosine(1000), lambda z_t, timestep, condition: z_t * condition["label"], prediction="z_0")
    >>> guided = Guided(denoiser, scale=3.0, null_condition={"label": torch.zeros(1, 1)})
    >>> guided(torch.ones(1, 2), 500, {"label": torch.ones(1, 1)}).z_0  # 0 + 3 (1 - 0)
    tensor([[3., 3.]])

        z_0 = null + scale (cond - null)   while u = t / T is in the interval, else cond

    Guiding z_0 is equivalent to guiding eps, v or flow, which are affine functions of z_0 at a given z_t. If Sigma is
    learned, v comes from the conditional branch. Both branches run in a single batch. Outside the interval,
    and at scale = 1, only the conditional branch runs.
    Source: Ho and Salimans 2022, arXiv:2207.12598, eq. 6 (scale = w + 1); the interval is from Kynkäänniemi et al.
    2024, arXiv:2404.07724.

    Args:
        denoiser: the denoiser to guide.
        scale: guidance scale; 1 disables guidance, and 0 makes the prediction unconditional.
        null_condition: the conditioning inputs of the unconditional branch, each with batch size 1.
        interval: lowest and highest u = t / T at which guidance is applied, both inclusive.

    Raises:
        ValueError: if the interval is not within [0, 1] or is reversed, or if the batch size of a null condition is
            not 1.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        scale: float,
        null_condition: Condition,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        if not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"the guidance interval in u = t / T must satisfy 0 <= low <= high <= 1; got {interval}")
        for name, value in null_condition.items():
            if value.ndim < 1 or len(value) != 1:
                raise ValueError(f"null condition {name!r} must have batch size 1; got shape {list(value.shape)}")
        self.denoiser = denoiser
        self.scale = scale
        self.null_condition = null_condition
        self.interval = interval

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the guided denoiser."""
        return self.denoiser.schedule

    def __call__(self, z_t: Float[Tensor, " b *z"], t: Step, condition: Condition | None = None) -> Prediction:
        """Predict z_0 from z_t with guidance.

        Raises:
            ValueError: if t is not in 1..T, if the condition is missing, or if its names or shapes differ from those of
                the null condition.
        """
        low, high = self.interval
        u = torch.as_tensor(t) / self.schedule.num_steps
        is_inside = (u >= low) & (u <= high)
        if self.scale == 1 or not is_inside.any():
            return self.denoiser(z_t, t, condition)
        stacked_t = t if isinstance(t, int | float) else torch.cat([t, t])
        stacked = self.denoiser(torch.cat([z_t, z_t]), stacked_t, self._stack_null(condition))
        cond, null = stacked.z_0.chunk(2)
        is_inside = is_inside.reshape(-1, *(1,) * (z_t.ndim - 1)).to(cond)
        scale = 1 + (self.scale - 1) * is_inside
        return Prediction(null + scale * (cond - null), None if stacked.v is None else stacked.v.chunk(2)[0])

    def _stack_null(self, condition: Condition | None) -> dict[str, Tensor]:
        names, expected = sorted(condition or {}), sorted(self.null_condition)
        if condition is None or names != expected:
            raise ValueError(f"guidance needs the conditions {expected} of its null condition; got {names}")
        stacked = {}
        for name, value in condition.items():
            null = self.null_condition[name]
            if value.shape[1:] != null.shape[1:]:
                raise ValueError(
                    f"condition {name!r} has shape {list(value.shape[1:])} per sample, but its null condition has "
                    f"shape {list(null.shape[1:])}; pad both to the same shape"
                )
            stacked[name] = torch.cat([value, null.to(value).expand_as(value)])
        return stacked
