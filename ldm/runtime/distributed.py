"""Communication between the ranks of a training run."""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

Value = TypeVar("Value")


def is_main_process() -> bool:
    """Return True on rank 0, and in a single process. Also works before the process group is initialised."""
    return getattr(rank_zero_only, "rank", 0) == 0


def warn(message: str) -> None:
    """Print a warning to standard error, on rank 0 only."""
    if is_main_process():
        print(f"warning: {message}", file=sys.stderr, flush=True)


def end_communication() -> None:
    """Shut down the communication between the ranks. Call it on every rank, after the last collective.

    Otherwise, threads of the backend can abort a rank when its process exits, and the launcher then kills rank 0 before
    it has exported the weights.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def broadcast_from_rank_0(value: Value) -> Value:
    """Return rank 0's value on every rank. A collective: call it on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_rows(micro_batches: Sequence[Tensor]) -> Tensor:
    """Gather the rows of a step from all ranks, in the order of `ldm.data.order.micro_batch_rows`.

    A collective: call it on every rank.

    Args:
        micro_batches: This rank's rows, one tensor [n, ...] per micro-batch, with the same shape on every rank.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return torch.cat(list(micro_batches))
    local = torch.stack(list(micro_batches))
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, local)
    return torch.stack(gathered, dim=1).flatten(0, 2)


class Agreement:
    """Named integers on which all ranks agree. Each is the maximum of the values computed by the ranks."""

    def __init__(self) -> None:
        self._functions: dict[str, Callable[[], int]] = {}
        self.values: dict[str, int] = {}

    def register(self, name: str, function: Callable[[], int]) -> None:
        """Register the function that computes a value. All ranks must register the same names in the same order."""
        self._functions[name] = function

    def update(self, trainer: Trainer) -> dict[str, int]:
        """Compute all values and return their maxima over the ranks. A collective: call it on every rank."""
        values = [int(function()) for function in self._functions.values()]
        if trainer.world_size > 1:
            shared = torch.tensor(values, device=trainer.strategy.root_device)
            dist.all_reduce(shared, dist.ReduceOp.MAX)
            values = shared.tolist()
        self.values = dict(zip(self._functions, values, strict=True))
        return self.values
