"""Parameter groups of the optimizer: no weight decay on biases and norms, and a separate group of hidden matrices."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerFactory:
    """Builds the optimizer. Parameters with fewer than two dimensions (biases, norms) get no weight decay.

    The matrices in a transformer's blocks form a separate group marked `hidden`, for optimizers such as Muon.

    Args:
        build: parameter groups -> optimizer, e.g. a partial of torch.optim.AdamW.
    """

    build: Callable[..., torch.optim.Optimizer]

    def __call__(self, *modules: nn.Module) -> torch.optim.Optimizer:
        trainable = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
        hidden = [p for name, p in trainable if p.ndim == 2 and _is_hidden(name)]
        decay = [p for name, p in trainable if p.ndim >= 2 and not (p.ndim == 2 and _is_hidden(name))]
        no_decay = [p for _, p in trainable if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
        if hidden:
            groups.append({"params": hidden, "hidden": True})
        return self.build([group for group in groups if group["params"]])


def _is_hidden(name: str) -> bool:
    """Return True for parameters of transformer blocks, except the adaLN modulation."""
    return name.startswith("blocks.") and "modulation" not in name
