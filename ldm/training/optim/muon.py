"""Muon for the matrices inside a transformer's blocks and AdamW for everything else, as one optimizer.

Muon orthogonalises the momentum of each matrix, so that the matrix changes at the same rate in all directions. We use
torch's implementation, scaled to AdamW's step size so that both optimizers share one learning rate. Sources: Jordan et
al. 2024, kellerjordan.github.io/posts/muon, and, for the scaling, Liu et al. 2025, arXiv:2502.16982.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """Combines Muon and AdamW behind the interface of a single optimizer.

    A network without transformer blocks, such as a UNet, has no parameters for Muon and is trained with AdamW alone.
    As with torch's fused optimizers, a step is skipped if the attribute `found_inf`, a scalar tensor, is 1.

    Args:
        params: Parameter groups. Groups with `hidden=True` are trained with Muon and must contain only matrices.
        lr: Learning rate of both optimizers.
        betas, fused: Options of AdamW.
        momentum: Momentum of Muon.
        weight_decay: Default weight decay of both optimizers, which parameter groups can override.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        fused: bool = True,
    ) -> None:
        groups = list(params)
        hidden_groups = [group for group in groups if group.pop("hidden", False)]
        other_groups = [group for group in groups if not any(group is h for h in hidden_groups)]
        self.optimizers: list[Optimizer] = []
        if hidden_groups:
            self.optimizers.append(
                Muon(hidden_groups, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw")
            )
        if other_groups:
            beta1, beta2 = betas
            self.optimizers.append(
                AdamW(other_groups, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay, fused=fused)
            )
        super().__init__([group for optimizer in self.optimizers for group in optimizer.param_groups], {})
        self._link_optimizers()
        self._step_supports_amp_scaling = fused  # torch's flag for optimizers that support found_inf

    def _link_optimizers(self) -> None:
        """Share groups and states with the inner optimizers, so that they see changes to the learning rate."""
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.state.clear()
        for optimizer in self.optimizers:
            self.state.update(optimizer.state)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon) and found_inf is not None:
                step_unless_inf(optimizer, found_inf)
            else:
                if found_inf is not None:
                    optimizer.found_inf = found_inf  # type: ignore[attr-defined]
                optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"inner": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["inner"], strict=True):
            optimizer.load_state_dict(state)
        self._link_optimizers()


@torch.no_grad()
def step_unless_inf(muon: Muon, found_inf: Tensor) -> None:
    """Take a Muon step unless found_inf is 1. Torch's Muon does not support found_inf itself.

    To skip a step, restore the matrices and average each momentum with itself, which leaves the momentum bit-identical.
    """
    skip = found_inf.bool()
    matrices = [p for group in muon.param_groups for p in group["params"] if p.grad is not None]
    copies = [p.clone() for p in matrices]
    for p in matrices:
        momentum = muon.state[p].get("momentum_buffer", p.new_zeros(()))
        p.grad = torch.where(skip, momentum, p.grad)
    muon.step()
    for p, copy in zip(matrices, copies, strict=True):
        p.copy_(torch.where(skip, copy, p))
