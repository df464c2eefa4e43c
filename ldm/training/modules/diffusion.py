"""Stage 2 training: a diffusion model on the latents of stage 1 (Ho et al. 2020, arXiv:2006.11239, Algorithm 1)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Condition
from ldm.diffusion.loss import ImportanceTimesteps, sample_timesteps
from ldm.diffusion.objective import DenoisingBatch, Objective
from ldm.diffusion.samplers.base import SamplerLike
from ldm.diffusion.schedule import NoiseSchedule
from ldm.image_grid import grid, to_pil
from ldm.networks.conditioning import drop
from ldm.runtime.distributed import gather_rows
from ldm.runtime.random import Draws, sample_generators
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training.callbacks.loggers import save_grid
from ldm.training.modules.base import TrainingModule
from ldm.training.optim.factory import OptimizerFactory

NUM_BANDS = 4
"""Number of intervals of t for which the validation loss is logged separately."""
LatentBatch = dict[str, Any]
"""Posterior means and log-variances [b, views, C, h, w], and a condition."""


class DiffusionTraining(TrainingModule):
    """Trains a network to denoise z_t. Each batch contains the posterior moments and a condition (`LatentBatch`).

    Args:
        pipeline: Pipeline with the network to train.
        objective: Computes the loss.
        optimizer: Builds the optimizer.
        drop_condition: Fraction of conditions replaced by the null condition, for classifier-free guidance.
        seed: The random draws for row i in step k depend only on seed, k and i.
        grid_conditions: Conditions and captions for the sample grid.
        sampler, guidance: Sampler and guidance scale for the sample grid.
        figures_dir: Folder for the sample grids.
    """

    def __init__(
        self,
        pipeline: LatentDiffusion,
        objective: Objective,
        optimizer: OptimizerFactory,
        *,
        drop_condition: float,
        seed: int,
        grid_conditions: tuple[Condition, list[str | None]],
        sampler: SamplerLike,
        guidance: float,
        figures_dir: Path,
    ) -> None:
        super().__init__(pipeline.network, optimizer, seed)
        self.pipeline, self.objective, self.drop_condition = pipeline, objective, drop_condition
        self.grid_conditions, self.sampler, self.guidance = grid_conditions, sampler, guidance
        self.figures_dir = figures_dir
        self.null_condition = pipeline.conditioning.null()
        self.importance = ImportanceTimesteps(self.schedule.num_steps) if objective.timesteps == "importance" else None
        self._last_losses: tuple[Tensor, Tensor] | None = None
        self._step_losses: list[tuple[Tensor, Tensor]] = []
        self._num_validated = 0

    @property
    def schedule(self) -> NoiseSchedule:
        return self.pipeline.schedule

    def _denoise(self, z_0: Tensor, t: Tensor, condition: Condition, draws: Draws) -> DenoisingBatch:
        return DenoisingBatch.run(self.pipeline.denoiser(), z_0, draws.randn(z_0.shape), t, condition)

    def losses(self, batch: LatentBatch, draws: Draws) -> dict[str, Tensor]:
        mean, log_variance, condition = batch["mean"], batch["log_variance"], batch["condition"]
        size, device = len(mean), mean.device
        view, rows = draws.randint(0, mean.shape[1]), torch.arange(size, device=device)
        mean, log_variance = mean[rows, view], log_variance[rows, view]
        z_0 = self.pipeline.autoencoder.standardise(mean + (0.5 * log_variance).exp() * draws.randn(mean.shape))
        weights = None
        if self.importance is None:
            steps, distribution = self.schedule.num_steps, self.objective.timesteps
            t = draws.draw(lambda count, generator: sample_timesteps(steps, count, distribution, generator, device))
        else:
            importance = self.importance
            t = draws.draw(lambda count, generator: importance.sample(count, generator)[0])
            weights = importance.weights(t)
        if condition:
            condition = drop(condition, self.null_condition, draws.rand((size,)) < self.drop_condition)
        denoising = self._denoise(z_0, t, condition, draws)
        loss = self.objective.loss_per_sample(self.schedule, denoising, self.pipeline.variance)
        self._last_losses = (t, loss.detach())
        return {"loss": (loss if weights is None else loss * weights).mean()}

    def on_train_start(self) -> None:
        super().on_train_start()
        self._step_losses = []

    def on_train_batch_end(self, outputs: Any, batch: LatentBatch, batch_idx: int) -> None:
        """Update the importance sampling of t with this step's per-sample losses from all ranks.

        The method `losses` cannot do this, because it also runs in trial steps. Non-finite losses are ignored.
        """
        if self.importance is None or self._last_losses is None:
            return
        self._step_losses.append(self._last_losses)
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        t, losses = (gather_rows(values) for values in zip(*self._step_losses, strict=True))
        self._step_losses, finite = [], losses.isfinite()
        self.importance.update(t[finite], losses[finite])

    def validation_step(self, batch: LatentBatch, batch_idx: int) -> None:
        """Log L_simple for each band of t and the variational bound, using posterior means and fixed noise."""
        z_0 = self.pipeline.autoencoder.standardise(batch["mean"][:, 0])
        size, steps = len(z_0), self.schedule.num_steps
        start = self._num_validated if batch_idx else 0
        self._num_validated = start + size
        draws = Draws(0, 0, range(start, start + size), z_0.device)
        losses, bounds = [], []
        for band in range(NUM_BANDS):
            low, high = steps * band // NUM_BANDS, steps * (band + 1) // NUM_BANDS
            t = draws.randint(low + 1, high + 1)
            arguments = self.schedule, self._denoise(z_0, t, batch["condition"], draws), self.pipeline.variance
            losses.append(self.objective.simple(*arguments).mean())
            bounds.append(self.objective.vlb(*arguments).mean())
            name = f"val/loss_t{low + 1}_to_{high}"
            self.log(name, losses[-1], batch_size=size, sync_dist=True)
        self.log("val/loss", torch.stack(losses).mean(), batch_size=size, sync_dist=True)
        self.log("val/vlb_bits_per_latent_dim", torch.stack(bounds).mean().float(), batch_size=size, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Save the sample grid while the network still has the EMA weights."""
        if not self.trainer.sanity_checking and self.trainer.is_global_zero:
            images, captions = self.sample_grid()
            figure = grid(images, captions if any(captions) else None, columns=4)
            save_grid(self, self.figures_dir, "samples", figure, images, captions)

    def sample_grid(self) -> tuple[list[Any], list[str | None]]:
        """Sample the images in the grid from fixed noise. Return the images and their captions."""
        condition, captions = self.grid_conditions
        was_training = self.trained.training
        generators = sample_generators(0, range(len(captions)))
        z = self.pipeline.sample(self.sampler, condition, generators, guidance=self.guidance)
        self.trained.train(was_training)
        return to_pil(self.pipeline.decode(z)), captions
