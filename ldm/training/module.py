"""What both stages' LightningModules share: the step, the optimizer, and noise that depends on seed and batch alone."""

import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from ldm.data.order import derive_seed
from ldm.training.guard import Guard
from ldm.training.stage import OptimizerFactory
from ldm.training.throughput import count_flops


class TrainingModule(LightningModule):
    """Base of a stage's module.

    Args:
        trained: The network that is optimised, averaged and saved.
        optimizer: Builds the optimizer.
        seed: All draws of batch k depend on seed, rank and k alone.
    """

    log_every = 50
    trained: Any
    progress: Callable[[int], float] = staticmethod(lambda step: 0.0)
    """The share of the budget that is spent at a step; the front door sets it."""
    guard: Guard | None = None
    """Leaves out steps whose numbers go wrong; the callback puts itself here."""
    step_offset = 0
    """Steps by which samples and draws are ahead of the optimizer: those that training went back over."""

    def __init__(self, trained: nn.Module, optimizer: OptimizerFactory, seed: int) -> None:
        super().__init__()
        self.trained = trained
        self.optimizer, self.seed = optimizer, seed
        self._batch_index = 0

    @abstractmethod
    def losses(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """The terms of a batch's loss by name; `loss` is what is minimised. Changes no weights."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        terms = self.losses(batch, self.next_generator())
        if self.logs_now:
            self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        loss = terms["loss"]
        return {"loss": loss if self.guard is None else self.guard.watch(loss)}

    def measure_step(self, batch: Any, autocast: Callable[[], AbstractContextManager], repeats: int = 3) -> float:
        """Seconds that a forward and backward pass takes, the fastest of `repeats`. Leaves no gradients behind."""
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            with autocast():
                loss = self.losses(batch, torch.Generator(device=self.device).manual_seed(0))["loss"]
            loss.backward()
            loss.item()  # an accelerator has finished only now
            times.append(time.perf_counter() - start)
        self.trained.zero_grad(set_to_none=True)
        return min(times)

    def count_flops(self, batch: Any, autocast: Callable[[], AbstractContextManager]) -> dict[bool, float]:
        """Floating-point operations of a forward and backward pass, by whether a discriminator takes part."""

        def step() -> None:
            with autocast():
                loss = self.losses(batch, torch.Generator(device=self.device).manual_seed(0))["loss"]
            loss.backward()

        flops = count_flops(step)
        self.trained.zero_grad(set_to_none=True)
        return {False: flops}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.trained)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, judge and log the gradient's norm. Lightning's refuses fused optimizers; yet bf16 needs no scaler."""
        if isinstance(self.trainer.strategy, FSDPStrategy):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        if gradient_clip_val:
            norm = nn.utils.clip_grad_norm_(self.trained.parameters(), gradient_clip_val)
        elif self.logs_now or self.guard is not None:
            norm = nn.utils.get_total_norm([p.grad for p in self.trained.parameters() if p.grad is not None])
        if self.guard is not None:
            self.guard.judge(optimizer, norm)
        if self.logs_now:
            self.log("train/gradient_norm", norm)

    def on_train_start(self) -> None:
        self._batch_index = (self.trainer.global_step + self.step_offset) * self.trainer.accumulate_grad_batches

    @property
    def logs_now(self) -> bool:
        """Whether this step's numbers are wanted: those of the step after which Lightning writes its row."""
        return (self.trainer.global_step + 1) % self.log_every == 0

    def next_generator(self) -> torch.Generator:
        """The generator for every draw of this batch."""
        generator = torch.Generator(device=self.device)
        generator.manual_seed(derive_seed(self.seed, self._batch_index, self.global_rank))
        self._batch_index += 1
        return generator
