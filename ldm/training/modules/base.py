"""Base LightningModule of both stages: training step, optimizer, and reproducible random draws."""

import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from ldm.data.order import micro_batch_rows
from ldm.runtime.random import Draws, derive_seed
from ldm.training.callbacks.guard import Guard
from ldm.training.optim.factory import OptimizerFactory

NETWORK_DRAWS = 1
"""Seed component for random draws inside the network, such as dropout."""


class TrainingModule(LightningModule):
    """Base class of the training modules of both stages.

    Args:
        trained: The network that is optimised, averaged and saved.
        optimizer: Builds the optimizer.
        seed: The random draws for row i in step k depend only on seed, k and i.
    """

    log_every = 50
    """Number of steps between logged metrics. Set by `Fit`."""
    trained: Any
    progress: Callable[[int], float] = staticmethod(lambda step: 0.0)
    """Returns the fraction of the budget spent at a step. Set by `Fit`."""
    guard: Guard | None = None
    """Skips bad steps. Set by `Guard.setup`."""
    fraction_without_adversary = 1.0
    """Fraction of the budget spent training without a discriminator."""
    second_phase_at = 1.0
    """Fraction of the budget at which a second phase starts, with its own learning rate schedule; 1 for none."""
    in_second_phase = False
    """True in the second phase. Set by `Budget`."""
    step_offset = 0
    """Number of steps by which rollbacks have moved the data and random draws ahead of the optimizer."""

    def __init__(self, trained: nn.Module, optimizer: OptimizerFactory, seed: int) -> None:
        super().__init__()
        self.trained = trained
        self.optimizer, self.seed = optimizer, seed

    @abstractmethod
    def losses(self, batch: Any, draws: Draws) -> dict[str, Tensor]:
        """Return the loss terms of a batch by name, without changing any weights. The term `loss` is minimised.

        Each term must be a mean over independent samples, so that a batch can be split over micro-batches and ranks.
        """

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        rows = micro_batch_rows(micro_batch, self.global_rank, self.trainer.world_size, num_samples(batch))
        self._seed_network(derive_seed(self.seed, self.data_step, rows.start, NETWORK_DRAWS))
        terms = self.losses(batch, Draws(self.seed, self.data_step, rows, self.device))
        if self.logs_this_step:
            self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        loss = terms["loss"]
        return {"loss": loss if self.guard is None else self.guard.record_loss(loss)}

    def start_second_phase(self) -> None:
        """Prepare the second phase. Called once, before its first step."""

    def trial_step(self, batch: Any, autocast: Callable[[], AbstractContextManager]) -> float:
        """Run a forward and backward pass without an optimizer step. Return the duration in seconds."""
        start = time.perf_counter()
        with autocast():
            loss = self.losses(batch, self.trial_draws(batch))["loss"]
        loss.backward()
        loss.item()  # wait for the accelerator
        return time.perf_counter() - start

    def measure_each_mode(self, measure: Callable[[], float]) -> dict[bool, float]:
        """Return the result of `measure` without (False) and with (True) a discriminator, and clear the gradients.

        Args:
            measure: Runs trial steps and returns a measurement.
        """
        result = measure()
        self.trained.zero_grad(set_to_none=True)
        return {False: result}

    def measure_step(self, batch: Any, autocast: Callable[[], AbstractContextManager]) -> float:
        """Return the seconds per step (best of three), averaged over steps with and without a discriminator."""
        seconds = self.measure_each_mode(lambda: min(self.trial_step(batch, autocast) for _ in range(3)))
        fraction = self.fraction_without_adversary
        return fraction * seconds[False] + (1 - fraction) * seconds.get(True, 0.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.trained)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient, pass the gradient norm to the guard, and log the norm.

        Lightning's own method rejects fused optimizers because of gradient scaling, which bf16 does not need.
        """
        if gradient_clip_val:
            norm = nn.utils.clip_grad_norm_(self.trained.parameters(), gradient_clip_val)
        elif self.logs_this_step or self.guard is not None:
            norm = nn.utils.get_total_norm([p.grad for p in self.trained.parameters() if p.grad is not None])
        if self.guard is not None:
            self.guard.check_gradient(optimizer, norm)
        if self.logs_this_step:
            self.log("train/gradient_norm", norm)

    def on_train_start(self) -> None:
        # Lightning takes an optimizer step when its micro-batch count is a multiple of accumulate_grad_batches. This
        # setting can change when a run is resumed, so round the restored counts up to a multiple.
        counts: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        num_missing = -counts.processed % self.trainer.accumulate_grad_batches
        for name in ("ready", "started", "processed", "completed"):
            setattr(counts, name, getattr(counts, name) + num_missing)

    @property
    def logs_this_step(self) -> bool:
        """True if Lightning logs metrics after this step."""
        return (self.trainer.global_step + 1) % self.log_every == 0

    @property
    def data_step(self) -> int:
        """Index of the current batch in the data order, which also seeds the random draws."""
        return self.trainer.global_step + self.step_offset

    def _seed_network(self, seed: int) -> None:
        """Seed the global generators. Dropout uses them, and validation and data loader workers advance them."""
        torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds all device types and is 30 times slower
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def trial_draws(self, batch: Any) -> Draws:
        """Return fixed random draws for a trial step."""
        return Draws(0, 0, range(num_samples(batch)), self.device)


def num_samples(batch: Any) -> int:
    """Return the number of samples in a batch, which is a tensor or a dict that contains tensors."""
    if isinstance(batch, dict):
        batch = next(value for value in batch.values() if isinstance(value, Tensor))
    return len(batch)
