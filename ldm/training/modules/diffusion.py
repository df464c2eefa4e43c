"""Stage 2: a denoising diffusion model on the latents of stage 1 (Algorithm 1 of Ho et al. 2020, arXiv:2006.11239)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Condition
from ldm.diffusion.loss import ImportanceTimesteps, sample_timesteps
from ldm.diffusion.objective import Denoising, Objective
from ldm.diffusion.samplers.base import SamplerLike
from ldm.diffusion.schedule import NoiseSchedule
from ldm.image_grid import grid, to_pil
from ldm.networks.conditioning import drop
from ldm.runtime.distributed import gather_rows
from ldm.runtime.random import Draws, sample_generators
from ldm.sampling.pipeline import LatentDiffusionPipeline
from ldm.training.callbacks.loggers import save_grid
from ldm.training.modules.base import TrainingModule
from ldm.training.optim.factory import OptimizerFactory

NUM_BANDS = 4
BATCH = dict[str, Any]


class DiffusionTraining(TrainingModule):
    """Trains a network to denoise z_t; a batch holds moments [b, views, C, h, w] and a condition.

    Args:
        pipeline: The parts, with the network to train.
        objective: The loss.
        optimizer: Builds the optimizer.
        drop_condition: Share of conditions replaced by the null one, for classifier-free guidance.
        seed: Noise, timestep and drop of row i of step k depend on seed, k and i alone.
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
        sampler: SamplerLike,
        guidance: float,
        pictures: Path,
    ) -> None:
        super().__init__(pipeline.network, optimizer, seed)
        self.pipeline, self.objective, self.drop_condition = pipeline, objective, drop_condition
        self.shown, self.sampler, self.guidance, self.pictures = shown, sampler, guidance, pictures
        self.null = pipeline.conditioning.null()
        self.importance = ImportanceTimesteps(self.schedule.num_steps) if objective.timesteps == "importance" else None
        self._drawn: tuple[Tensor, Tensor] | None = None
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._num_validated = 0

    @property
    def schedule(self) -> NoiseSchedule:
        return self.pipeline.schedule

    def _denoise(self, z_0: Tensor, t: Tensor, condition: Condition, draws: Draws) -> Denoising:
        return Denoising.run(self.pipeline.denoiser(), z_0, draws.randn(z_0.shape), t, condition)

    def losses(self, batch: BATCH, draws: Draws) -> dict[str, Tensor]:
        mean, log_variance, condition = batch["mean"], batch["log_variance"], batch["condition"]
        size, device = len(mean), mean.device
        view, rows = draws.randint(0, mean.shape[1]), torch.arange(size, device=device)
        mean, log_variance = mean[rows, view], log_variance[rows, view]
        z_0 = self.pipeline.autoencoder.standardise(mean + (0.5 * log_variance).exp() * draws.randn(mean.shape))
        weights = None
        if self.importance is None:
            steps, how = self.schedule.num_steps, self.objective.timesteps
            t = draws.draw(lambda count, generator: sample_timesteps(steps, count, how, generator, device))
        else:
            importance = self.importance
            t = draws.draw(lambda count, generator: importance.sample(count, generator)[0])
            weights = importance.weights(t)
        if condition:
            condition = drop(condition, self.null, draws.rand((size,)) < self.drop_condition)
        made = self._denoise(z_0, t, condition, draws)
        loss = self.objective.per_sample(self.schedule, made, self.pipeline.variance)
        self._drawn = (t, loss.detach())
        return {"loss": (loss if weights is None else loss * weights).mean()}

    def on_train_start(self) -> None:
        super().on_train_start()
        self._seen = []

    def on_train_batch_end(self, outputs: Any, batch: BATCH, batch_idx: int) -> None:
        """After a step, remember where the bound is large, by all of its rows.

        Not while the loss is computed, which may be tried out of turn. A loss that is not finite says nothing of t.
        """
        if self.importance is None or self._drawn is None:
            return
        self._seen.append(self._drawn)
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        t, losses = (gather_rows(parts) for parts in zip(*self._seen, strict=True))
        self._seen, finite = [], losses.isfinite()
        self.importance.update(t[finite], losses[finite])

    def validation_step(self, batch: BATCH, batch_idx: int) -> None:
        """L_simple per band of t, and the bound, on the posterior means with noise that is the same every time."""
        z_0 = self.pipeline.autoencoder.standardise(batch["mean"][:, 0])
        size, steps = len(z_0), self.schedule.num_steps
        first = self._num_validated if batch_idx else 0
        self._num_validated = first + size
        draws = Draws(0, 0, range(first, first + size), z_0.device)
        losses, bounds = [], []
        for band in range(NUM_BANDS):
            low, high = steps * band // NUM_BANDS, steps * (band + 1) // NUM_BANDS
            t = draws.randint(low + 1, high + 1)
            made = self.schedule, self._denoise(z_0, t, batch["condition"], draws), self.pipeline.variance
            losses.append(self.objective.simple(*made).mean())
            bounds.append(self.objective.vlb(*made).mean())
            name = f"val/loss_t{low + 1}_to_{high}"
            self.log(name, losses[-1], batch_size=size, sync_dist=True)
        self.log("val/loss", torch.stack(losses).mean(), batch_size=size, sync_dist=True)
        self.log("val/vlb_bits_per_latent_dim", torch.stack(bounds).mean().float(), batch_size=size, sync_dist=True)

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
