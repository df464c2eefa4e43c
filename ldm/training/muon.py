"""Muon for the matrices inside a transformer's blocks, AdamW for everything else, as one optimizer.

Muon orthogonalises each matrix's momentum, so that all of its directions move at the same rate. It is torch's;
scaled to AdamW's step size, one learning rate serves both. Source: Jordan et al. 2024,
kellerjordan.github.io/posts/muon; the scaling is Moonshot's, arXiv:2502.16982.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """Both optimizers behind one: their groups, steps and states side by side.

    A network without transformer blocks, a UNet say, has no group for Muon and is AdamW's alone.

    Args:
        params: Groups; those with `hidden=True` go to Muon and must hold matrices only.
        lr: Learning rate of both.
        betas, fused: AdamW's.
        momentum: Muon's.
        weight_decay: Of both, where a group sets none.
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
        hidden = [group for group in groups if group.pop("hidden", False)]
        others = [group for group in groups if not any(group is one for one in hidden)]
        self.inner: list[Optimizer] = []
        if hidden:
            self.inner.append(
                Muon(hidden, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw")
            )
        if others:
            first, second = betas
            self.inner.append(AdamW(others, lr=lr, betas=(first, second), weight_decay=weight_decay, fused=fused))
        super().__init__([group for optimizer in self.inner for group in optimizer.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Show the inner optimizers' own groups and states, so that a learning rate set here is theirs."""
        self.param_groups = [group for optimizer in self.inner for group in optimizer.param_groups]
        self.state.clear()
        for optimizer in self.inner:
            self.state.update(optimizer.state)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.inner:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"inner": [optimizer.state_dict() for optimizer in self.inner]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.inner, state_dict["inner"], strict=True):
            optimizer.load_state_dict(state)
        self._share()
