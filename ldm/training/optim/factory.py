"""Optimizers from parameter groups: no weight decay on biases and norms, hidden matrices apart."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerFactory:
    """Makes the optimizer; parameters of fewer than two dimensions (biases, norms) are not decayed.

    The matrices in a transformer's blocks come as a group of their own, marked `hidden`, for optimizers that treat
    them apart.

    Args:
        build: parameter groups -> optimizer, e.g. a partial of torch.optim.AdamW.
    """

    build: Callable[..., torch.optim.Optimizer]

    def __call__(self, *modules: nn.Module) -> torch.optim.Optimizer:
        trained = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
        hidden = [p for name, p in trained if p.ndim == 2 and _is_hidden(name)]
        decayed = [p for name, p in trained if p.ndim >= 2 and not (p.ndim == 2 and _is_hidden(name))]
        kept = [p for _, p in trained if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
        if hidden:
            groups.append({"params": hidden, "hidden": True})
        return self.build([group for group in groups if group["params"]])


def _is_hidden(name: str) -> bool:
    """A matrix between a transformer's hidden layers; adaLN's modulation is an output of the embedding instead."""
    return name.startswith("blocks.") and "modulation" not in name
