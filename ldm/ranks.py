"""What the processes of one training run hold together."""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


def from_first(value: Value) -> Value:
    """What the first rank has here; every rank must ask."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_rows(micro_batches: Sequence[Tensor]) -> Tensor:
    """All rows of a step in their order (`ldm.data.order.part_rows`), from those of this rank's micro-batches.

    Each is [n, ...], of the same shape on every rank; every rank must ask.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return torch.cat(list(micro_batches))
    own = torch.stack(list(micro_batches))
    ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, own)
    return torch.stack(ranks, dim=1).flatten(0, 2)
