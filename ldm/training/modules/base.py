"""What both stages' LightningModules share: the step, the optimizer, and noise that depends on seed and step alone."""

import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from ldm.data.order import part_rows
from ldm.runtime.random import Draws, derive_seed
from ldm.training.callbacks.guard import Guard
from ldm.training.optim.factory import OptimizerFactory

OF_NETWORK = 1
"""Sets the draws of a network of its own, such as dropout, apart from those of its rows."""


class TrainingModule(LightningModule):
    """Base of a stage's module.

    Args:
        trained: The network that is optimised, averaged and saved.
        optimizer: Builds the optimizer.
        seed: What row i of step k draws depends on seed, k and i alone.
    """

    log_every = 50
    trained: Any
    progress: Callable[[int], float] = staticmethod(lambda step: 0.0)
    """The share of the budget that is spent at a step; the front door sets it."""
    guard: Guard | None = None
    """Leaves out steps whose numbers go wrong; the callback puts itself here."""
    share_alone = 1.0
    """Of the budget, what is trained without a discriminator."""
    step_offset = 0
    """Steps by which samples and draws are ahead of the optimizer: those that training went back over."""

    def __init__(self, trained: nn.Module, optimizer: OptimizerFactory, seed: int) -> None:
        super().__init__()
        self.trained = trained
        self.optimizer, self.seed = optimizer, seed

    @abstractmethod
    def losses(self, batch: Any, draws: Draws) -> dict[str, Tensor]:
        """The terms of a batch's loss by name; `loss` is what is minimised. Changes no weights.

        Means over samples that do not depend on each other, so that micro-batches and ranks may share a batch.
        """

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        rows = part_rows(micro_batch, self.global_rank, self.trainer.world_size, num_samples(batch))
        self._seed_network(derive_seed(self.seed, self.data_step, rows.start, OF_NETWORK))
        terms = self.losses(batch, Draws(self.seed, self.data_step, rows, self.device))
        if self.logs_now:
            self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        loss = terms["loss"]
        return {"loss": loss if self.guard is None else self.guard.watch(loss)}

    def try_step(self, batch: Any, autocast: Callable[[], AbstractContextManager]) -> float:
        """A forward and backward pass on a batch that is not trained on; its seconds."""
        start = time.perf_counter()
        with autocast():
            loss = self.losses(batch, self.trial_draws(batch))["loss"]
        loss.backward()
        loss.item()  # an accelerator has finished only now
        return time.perf_counter() - start

    def each_way(self, measure: Callable[[], float]) -> dict[bool, float]:
        """What `measure` finds of tried steps, by whether a discriminator takes part. Leaves no gradients behind."""
        found = measure()
        self.trained.zero_grad(set_to_none=True)
        return {False: found}

    def measure_step(self, batch: Any, autocast: Callable[[], AbstractContextManager]) -> float:
        """Seconds of a step, the fastest of three; those with a discriminator count by their share of the budget."""
        seconds = self.each_way(lambda: min(self.try_step(batch, autocast) for _ in range(3)))
        return self.share_alone * seconds[False] + (1 - self.share_alone) * seconds.get(True, 0.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.trained)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, judge and log the gradient's norm. Lightning's refuses fused optimizers; yet bf16 needs no scaler."""
        if gradient_clip_val:
            norm = nn.utils.clip_grad_norm_(self.trained.parameters(), gradient_clip_val)
        elif self.logs_now or self.guard is not None:
            norm = nn.utils.get_total_norm([p.grad for p in self.trained.parameters() if p.grad is not None])
        if self.guard is not None:
            self.guard.judge(optimizer, norm)
        if self.logs_now:
            self.log("train/gradient_norm", norm)

    def on_train_start(self) -> None:
        # Lightning ends a step where its count of micro-batches divides, and before a resume they may have been others
        count: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        missing = -count.processed % self.trainer.accumulate_grad_batches
        for name in ("ready", "started", "processed", "completed"):
            setattr(count, name, getattr(count, name) + missing)

    @property
    def logs_now(self) -> bool:
        """Whether this step's numbers are wanted: those of the step after which Lightning writes its row."""
        return (self.trainer.global_step + 1) % self.log_every == 0

    @property
    def data_step(self) -> int:
        """The step whose samples and draws are seen now."""
        return self.trainer.global_step + self.step_offset

    def _seed_network(self, seed: int) -> None:
        """Dropout draws from the global generators, which validation and workers move on."""
        torch.default_generator.manual_seed(seed)  # torch.manual_seed visits every kind of device, 30 times as long
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def trial_draws(self, batch: Any) -> Draws:
        """Draws for a batch that is not trained on."""
        return Draws(0, 0, range(num_samples(batch)), self.device)


def num_samples(batch: Any) -> int:
    """Samples in a batch: a tensor, or tensors and conditions by name."""
    if isinstance(batch, dict):
        batch = next(value for value in batch.values() if isinstance(value, Tensor))
    return len(batch)
