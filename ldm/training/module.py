"""What both stages' LightningModules share: the optimizer, clipping, and noise that depends on seed and batch alone."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from ldm.data.order import derive_seed
from ldm.training.stage import OptimizerFactory


class TrainingModule(LightningModule):
    """Base of a stage's module.

    Args:
        trained: The network that is optimised, averaged and saved.
        optimizer: Builds the optimizer.
        seed: All draws of batch k depend on seed, rank and k alone.
    """

    log_every = 50
    trained: Any

    def __init__(self, trained: nn.Module, optimizer: OptimizerFactory, seed: int) -> None:
        super().__init__()
        self.trained = trained
        self.optimizer, self.seed = optimizer, seed
        self._batch_index = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.trained)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient's norm. Lightning's own refuses fused optimizers, though bf16 needs no scaler."""
        if not gradient_clip_val:
            return
        if isinstance(self.trainer.strategy, FSDPStrategy):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        norm = nn.utils.clip_grad_norm_(self.trained.parameters(), gradient_clip_val)
        if self.logs_now:
            self.log("train/gradient_norm", norm)

    def on_train_start(self) -> None:
        self._batch_index = self.trainer.global_step * self.trainer.accumulate_grad_batches

    @property
    def logs_now(self) -> bool:
        """Whether this step's numbers are wanted."""
        return self.trainer.global_step % self.log_every == 0

    def next_generator(self) -> torch.Generator:
        """The generator for every draw of this batch."""
        generator = torch.Generator(device=self.device)
        generator.manual_seed(derive_seed(self.seed, self._batch_index, self.global_rank))
        self._batch_index += 1
        return generator
