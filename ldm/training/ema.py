"""Exponential moving average of the trained parameters, and of nothing else.

    ema <- d ema + (1 - d) theta,   d_k = min(d, (1 + k) / (10 + k)) after k updates

The warm-up lets short runs forget their start. One foreach kernel per update.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.errors import UserError


class EMA:
    """Shadow weights of a module's trainable parameters.

    Raises:
        UserError: decay is not in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"trainer.ema_decay must be in [0, 1), not {decay}.")
        self.decay = decay
        self.num_updates = 0
        self._names, self._parameters = zip(
            *((name, p) for name, p in module.named_parameters() if p.requires_grad), strict=True
        )
        self.shadow: list[Tensor] = [p.detach().clone() for p in self._parameters]
        self.raw: dict[str, Tensor] = {}
        """The module's own weights by name, while the average stands in."""

    @torch.no_grad()
    def update(self) -> None:
        """Move the shadow towards the weights; once per optimizer step."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        if self.shadow[0].device != self._parameters[0].device:
            self.shadow = [s.to(p.device) for s, p in zip(self.shadow, self._parameters, strict=True)]
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self._parameters], 1 - decay)
        self.num_updates += 1

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """The module holds the averaged weights inside, and its own again after, whatever happens."""
        self.raw = {name: p.detach().clone() for name, p in zip(self._names, self._parameters, strict=True)}
        self._write(self.shadow)
        try:
            yield
        finally:
            self._write(list(self.raw.values()))
            self.raw = {}

    def copy_to_module(self) -> None:
        """Leave the averaged weights in the module for good."""
        self._write(self.shadow)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, object]:
        return {"num_updates": self.num_updates, "shadow": dict(zip(self._names, self.shadow, strict=True))}

    def load_state_dict(self, state: dict) -> None:
        self.num_updates = state["num_updates"]
        self.shadow = [state["shadow"][name].clone() for name in self._names]
