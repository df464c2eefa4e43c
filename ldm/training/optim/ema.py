"""Exponential moving average (EMA) of the trainable parameters.

    ema <- d_k ema + (1 - d_k) theta,   d_k = min(d, (1 + k) / (10 + k)) after k updates

The warm-up lets the average forget the initial weights even in short runs. A second training phase starts with a new
warm-up. Each update is a single foreach kernel.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn


class EMA:
    """Shadow weights of a module's trainable parameters."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self._names, self._parameters = zip(
            *((name, p) for name, p in module.named_parameters() if p.requires_grad), strict=True
        )
        self.shadow: list[Tensor] = [p.detach().clone() for p in self._parameters]
        self.raw_weights: dict[str, Tensor] = {}
        """The raw weights by name while the module has the averaged weights. Empty otherwise."""

    @torch.no_grad()
    def update(self) -> None:
        """Update the average. Call this once per optimizer step."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        if self.shadow[0].device != self._parameters[0].device:
            self.shadow = [s.to(p.device) for s, p in zip(self.shadow, self._parameters, strict=True)]
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self._parameters], 1 - decay)
        self.num_updates += 1

    @contextmanager
    @torch.no_grad()
    def average_parameters(self) -> Iterator[None]:
        """Context in which the module has the averaged weights. The raw weights are restored on exit."""
        self.raw_weights = {name: p.detach().clone() for name, p in zip(self._names, self._parameters, strict=True)}
        self.copy_to_module()
        try:
            yield
        finally:
            self.copy_to_module(list(self.raw_weights.values()))
            self.raw_weights = {}

    @torch.no_grad()
    def copy_to_module(self, values: list[Tensor] | None = None) -> None:
        """Copy the averaged weights, or the given values, into the module."""
        for parameter, value in zip(self._parameters, self.shadow if values is None else values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, object]:
        return {"num_updates": self.num_updates, "shadow": dict(zip(self._names, self.shadow, strict=True))}

    def load_state_dict(self, state: dict) -> None:
        self.num_updates = state["num_updates"]
        self.shadow = [state["shadow"][name].clone() for name in self._names]


class EMACallback(Callback):
    """Maintains the EMA weights of `module.trained` and validates with them."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.ema: EMA | None = None
        self._state: dict[str, Any] | None = None
        self._validation_context = ExitStack()
        self._last_step, self._in_second_phase = 0, False
        self.last_validation_step = -1

    def on_fit_start(self, trainer: Trainer, module: Any) -> None:
        self.ema = EMA(module.trained, self.decay)
        if self._state is not None:
            self.ema.load_state_dict(self._state)
            self._in_second_phase = self._state.get("in_second_phase", False)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._last_step = trainer.global_step  # on_fit_start runs before the step count is restored

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if self.ema is not None and trainer.global_step > self._last_step:
            self._last_step = trainer.global_step
            if module.in_second_phase and not self._in_second_phase:
                self.ema.num_updates = 0
            self._in_second_phase = module.in_second_phase
            self.ema.update()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.ema is not None:
            self._validation_context.enter_context(self.ema.average_parameters())

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._validation_context.close()
        self.last_validation_step = trainer.global_step

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._validation_context.close()

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the raw weights even if the checkpoint is written during validation."""
        if self.ema is not None:
            checkpoint["state_dict"].update({f"trained.{name}": value for name, value in self.ema.raw_weights.items()})

    def state_dict(self) -> dict[str, Any]:
        return {} if self.ema is None else {**self.ema.state_dict(), "in_second_phase": self._in_second_phase}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict or None
