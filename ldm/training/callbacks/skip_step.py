"""Whether a gradient is good, and a step that is left out: on the device where the gradient is, without a wait for it.

The verdict stays on the device, where the optimizer reads it as `found_inf`; the step's numbers are copied to the host
meanwhile and read after the next step has been queued. An optimizer that does not know `found_inf` (torch's own know it
with fused=True) costs a wait for the device at each step instead.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

LARGEST = torch.finfo(torch.float32).max


@dataclass
class RunningNorm:
    """The geometric mean of gradient norms, over about the last `memory` of them, and the limit that follows.

    A norm above the limit counts as the limit: one spike moves the mean little, also while none is told yet, and where
    norms stay high the mean follows them.
    """

    max_spike: float
    memory: int
    mean: float = 0.0
    count: int = 0

    @property
    def limit(self) -> float:
        """The largest norm that is no spike. Until `memory` norms are known, all finite ones are good."""
        known = self.count >= self.memory and self.mean > 0
        return min(self.max_spike * self.mean, LARGEST) if known else LARGEST

    def add(self, norm: float) -> None:
        """Take in a norm; one of 0, or that is not finite, says nothing."""
        if not 0 < norm < math.inf:
            return
        norm = min(norm, self.limit)
        self.count += 1
        weight = 1 / min(self.count, self.memory)
        self.mean = self.mean ** (1 - weight) * norm**weight


@dataclass
class Numbers:
    """A step's numbers on their way to the host: left out or not, the same of the discriminator, norm and losses."""

    step: int
    limit: float
    values: list[float] | Tensor
    arrived: torch.cuda.Event | None = None

    @classmethod
    def send(cls, step: int, limit: float, values: Tensor) -> "Numbers":
        """Start the copy; only CUDA's goes on beside the next step."""
        if values.device.type != "cuda":
            return cls(step, limit, values)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(step, limit, host, arrived)

    def read(self) -> list[float]:
        if isinstance(self.values, Tensor):
            if self.arrived is not None:
                self.arrived.synchronize()
            self.values = self.values.tolist()
        return self.values

    @property
    def bad(self) -> bool:
        return any(self.read()[:2])


def is_on_host(value: Tensor) -> bool:
    """Whether it is read without a wait."""
    return value.device.type == "cpu"


def leave_out(optimizer: Optimizer, bad: Tensor) -> None:
    """Make the optimizer's next step change nothing, neither weights nor state, where `bad`."""
    if not is_on_host(bad) and getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # as torch's GradScaler hands it over
    elif bad:
        for parameter in parameters_of(optimizer):
            parameter.grad = None  # which every optimizer passes over


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
