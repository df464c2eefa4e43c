"""Stage 2: a denoising diffusion model on the latents of stage 1 (Algorithm 1 of Ho et al. 2020, arXiv:2006.11239)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.order import derive_seed
from ldm.diffusion.chain import marginal
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.loss import DISTRIBUTIONS, WEIGHTINGS, sample_timesteps, simple_loss
from ldm.diffusion.sampler import Sampler
from ldm.diffusion.schedule import NoiseSchedule
from ldm.networks.conditioning import Condition, drop
from ldm.pictures import grid, to_pil
from ldm.pipeline import LatentDiffusionPipeline, sample_generators
from ldm.training.callbacks import save_grid
from ldm.training.module import TrainingModule
from ldm.training.stage import OptimizerFactory

NUM_BANDS = 4
BATCH = dict[str, Any]


@dataclass(frozen=True)
class Objective:
    """What the network predicts and how its error is weighted.

    Args:
        prediction: eps, z_0, v or flow.
        weighting: simple (1 in the prediction's own space) or min_snr (arXiv:2303.09556, with `gamma`).
        timesteps: How t is drawn while training: uniform or logit_normal.
    """

    prediction: str = "v"
    weighting: str = "simple"
    timesteps: str = "uniform"
    gamma: float = 5.0

    def __post_init__(self) -> None:
        for option, value, known in (
            ("weighting", self.weighting, WEIGHTINGS),
            ("timesteps", self.timesteps, DISTRIBUTIONS),
        ):
            if value not in known:
                raise ValueError(f"objective.{option}={value} is unknown. Choose one of: {', '.join(known)}.")


class DiffusionTraining(TrainingModule):
    """Trains a network to denoise z_t; a batch holds moments [b, views, C, h, w] and a condition.

    Args:
        pipeline: The parts, with the network to train.
        objective: The loss.
        optimizer: Builds the optimizer.
        drop_condition: Share of conditions replaced by the null one, for classifier-free guidance.
        seed: Noise, timesteps and drops of batch k depend on seed and k alone.
        shown: Conditions and captions of the sample grid.
        sampler, guidance: How the grid is drawn.
    """

    def __init__(
        self,
        pipeline: LatentDiffusionPipeline,
        objective: Objective,
        optimizer: OptimizerFactory,
        *,
        drop_condition: float,
        seed: int,
        shown: tuple[Condition, list[str | None]],
        sampler: Sampler,
        guidance: float,
        pictures: Path,
    ) -> None:
        super().__init__(pipeline.network, optimizer, seed)
        self.pipeline, self.objective, self.drop_condition = pipeline, objective, drop_condition
        self.shown, self.sampler, self.guidance, self.pictures = shown, sampler, guidance, pictures
        self.null = pipeline.conditioning.null()

    @property
    def schedule(self) -> NoiseSchedule:
        return self.pipeline.schedule

    def _denoiser(self) -> Denoiser:
        return self.pipeline.denoiser()

    def _loss(self, z_0: Tensor, t: Tensor, condition: Condition, generator: torch.Generator) -> Tensor:
        """Loss per sample, [b]."""
        eps = torch.randn(z_0.shape, generator=generator, device=z_0.device)
        output, _ = self._denoiser().output(marginal(self.schedule, z_0, t, eps), t, condition)
        objective = self.objective
        return simple_loss(
            self.schedule,
            output,
            z_0,
            eps,
            t,
            objective.prediction,
            weighting=objective.weighting,
            gamma=objective.gamma,
        )

    def losses(self, batch: BATCH, generator: torch.Generator) -> dict[str, Tensor]:
        mean, log_variance, condition = batch["mean"], batch["log_variance"], batch["condition"]
        size, device = len(mean), mean.device
        view = torch.randint(mean.shape[1], (size,), generator=generator, device=device)
        rows = torch.arange(size, device=device)
        mean, log_variance = mean[rows, view], log_variance[rows, view]
        noise = torch.randn(mean.shape, generator=generator, device=device)
        z_0 = self.pipeline.autoencoder.standardise(mean + (0.5 * log_variance).exp() * noise)
        t = sample_timesteps(self.schedule.num_steps, size, self.objective.timesteps, generator, device)
        if condition:
            dropped = torch.rand(size, generator=generator, device=device) < self.drop_condition
            condition = drop(condition, self.null, dropped)
        return {"loss": self._loss(z_0, t, condition, generator).mean()}

    def validation_step(self, batch: BATCH, batch_idx: int) -> None:
        """Loss per band of t on the posterior means, with noise that is the same every time."""
        z_0 = self.pipeline.autoencoder.standardise(batch["mean"][:, 0])
        size, steps = len(z_0), self.schedule.num_steps
        generator = torch.Generator(device=z_0.device).manual_seed(derive_seed(0, batch_idx))
        losses = []
        for band in range(NUM_BANDS):
            low, high = steps * band // NUM_BANDS, steps * (band + 1) // NUM_BANDS
            t = torch.randint(low + 1, high + 1, (size,), generator=generator, device=z_0.device)
            losses.append(self._loss(z_0, t, batch["condition"], generator).mean())
            name = f"val/loss_t{low + 1}_to_{high}"
            self.log(name, losses[-1], batch_size=size, sync_dist=True)
        self.log("val/loss", torch.stack(losses).mean(), batch_size=size, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Draw the sample grid while the averaged weights are still in place."""
        if not self.trainer.sanity_checking and self.trainer.is_global_zero:
            images, captions = self.draw()
            picture = grid(images, captions if any(captions) else None, columns=4)
            save_grid(self, self.pictures, "samples", picture, images, captions)

    def draw(self) -> tuple[list[Any], list[str | None]]:
        """The sample grid's pictures and captions; the noise is the same every time."""
        condition, captions = self.shown
        was_training = self.trained.training
        generators = sample_generators(0, range(len(captions)))
        z = self.pipeline.sample(self.sampler, condition, generators, guidance=self.guidance)
        self.trained.train(was_training)
        return to_pil(self.pipeline.decode(z)), captions
