"""Parameter groups of the optimizer: no weight decay on biases and norms, and a separate group for hidden matrices."""

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
        build: Builds the optimizer from the parameter groups, e.g. a partial of torch.optim.AdamW.
    """

    build: Callable[..., torch.optim.Optimizer]

    def __call__(self, *modules: nn.Module) -> torch.optim.Optimizer:
        parameters = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
        hidden_matrices = [p for name, p in parameters if p.ndim == 2 and _is_hidden(name)]
        decay_params = [p for name, p in parameters if p.ndim >= 2 and not (p.ndim == 2 and _is_hidden(name))]
        no_decay_params = [p for _, p in parameters if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": decay_params}, {"params": no_decay_params, "weight_decay": 0.0}]
        if hidden_matrices:
            groups.append({"params": hidden_matrices, "hidden": True})
        return self.build([group for group in groups if group["params"]])


def _is_hidden(name: str) -> bool:
    """Return True for parameters of transformer blocks, except those of the adaLN modulation."""
    return name.startswith("blocks.") and "modulation" not in name
