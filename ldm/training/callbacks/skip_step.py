"""Skipping steps with bad gradients without synchronising with the device.

The decision stays on the device, where the optimizer reads it as `found_inf`. The statistics of the step are copied to
the host asynchronously and read after the next step has been queued. Torch's own optimizers support `found_inf` with
fused=True. With optimizers that do not support it, every step synchronises.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

MAX_FLOAT32 = torch.finfo(torch.float32).max


@dataclass
class RunningNorm:
    """Running geometric mean of the gradient norm over about `window` steps, and the spike limit derived from it.

    Norms above the limit are clamped, so a single spike barely moves the mean, but the mean follows norms that stay
    high. A geometric mean is also robust to spikes before detection starts.
    """

    max_spike: float
    window: int
    mean: float = 0.0
    count: int = 0

    @property
    def limit(self) -> float:
        """Largest norm that is not a spike. Before `window` norms have been added, every finite norm is allowed."""
        is_warmed_up = self.count >= self.window and self.mean > 0
        return min(self.max_spike * self.mean, MAX_FLOAT32) if is_warmed_up else MAX_FLOAT32

    def add(self, norm: float) -> None:
        """Update the mean with a norm. Zero and non-finite norms are ignored."""
        if not 0 < norm < math.inf:
            return
        norm = min(norm, self.limit)
        self.count += 1
        weight = 1 / min(self.count, self.window)
        self.mean = self.mean ** (1 - weight) * norm**weight


@dataclass
class StepStats:
    """Statistics of a step, copied to the host asynchronously.

    Args:
        limit: Largest allowed gradient norm.
        values: Skip flags (0 or 1) for the step and for the discriminator's step, the gradient norm, and the losses.
        copy_event: Recorded after the copy; None if the values are already on the host.
    """

    step: int
    limit: float
    values: list[float] | Tensor
    copy_event: torch.cuda.Event | None = None

    @classmethod
    def send(cls, step: int, limit: float, values: Tensor) -> "StepStats":
        """Start copying the values to the host. On CUDA, the copy overlaps with the next step."""
        if values.device.type != "cuda":
            return cls(step, limit, values)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        copy_event = torch.cuda.Event()
        copy_event.record()
        return cls(step, limit, host, copy_event)

    def read(self) -> list[float]:
        """Return the values, waiting for the copy if necessary."""
        if isinstance(self.values, Tensor):
            if self.copy_event is not None:
                self.copy_event.synchronize()
            self.values = self.values.tolist()
        return self.values

    @property
    def is_bad(self) -> bool:
        """True if either optimizer skipped the step."""
        return any(self.read()[:2])


def is_on_cpu(value: Tensor) -> bool:
    """Return True if the value can be read without synchronising."""
    return value.device.type == "cpu"


def skip_step(optimizer: Optimizer, skip: Tensor) -> None:
    """If `skip` is true, make the optimizer's next step a no-op for both weights and optimizer state."""
    if not is_on_cpu(skip) and getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]  # the attribute that torch's GradScaler sets
    elif skip:
        for parameter in parameters_of(optimizer):
            parameter.grad = None  # optimizers ignore parameters without a gradient


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of all groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
