"""Muon for the matrices inside a transformer's blocks, AdamW for everything else, as one optimizer.

Muon orthogonalises each matrix's momentum, so that all of its directions move at the same rate. It is torch's;
scaled to AdamW's step size, one learning rate serves both. Source: Jordan et al. 2024,
kellerjordan.github.io/posts/muon; the scaling is Moonshot's, arXiv:2502.16982.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """Both optimizers behind one: their groups, steps and states side by side.

    A network without transformer blocks, a UNet say, has no group for Muon and is AdamW's alone.
    As torch's fused optimizers it changes nothing in a step where its attribute `found_inf`, a tensor [], is 1.

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
        self._step_supports_amp_scaling = fused  # torch's word for optimizers that heed found_inf

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
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for optimizer in self.inner:
            if isinstance(optimizer, Muon) and found_inf is not None:
                step_unless(optimizer, found_inf)
            else:
                if found_inf is not None:
                    optimizer.found_inf = found_inf  # type: ignore[attr-defined]
                optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"inner": [optimizer.state_dict() for optimizer in self.inner]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.inner, state_dict["inner"], strict=True):
            optimizer.load_state_dict(state)
        self._share()


@torch.no_grad()
def step_unless(muon: Muon, found_inf: Tensor) -> None:
    """A step of torch's Muon, which knows no found_inf: where that is 1, matrices are put back, and momenta averaged
    with themselves, which changes no bit of them."""
    left_out = found_inf.bool()
    matrices = [p for group in muon.param_groups for p in group["params"] if p.grad is not None]
    before = [p.clone() for p in matrices]
    for p in matrices:
        momentum = muon.state[p].get("momentum_buffer", p.new_zeros(()))
        p.grad = torch.where(left_out, momentum, p.grad)
    muon.step()
    for p, matrix in zip(matrices, before, strict=True):
        p.copy_(torch.where(left_out, matrix, p))
