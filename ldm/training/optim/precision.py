"""Which precision to train in: bf16 on GPUs; on a CPU, whichever a short measurement finds faster."""

import time
from typing import Any

import torch
from torch import nn

from ldm.errors import UserError

GAIN_NEEDED = 1.1
PRECISIONS = ("auto", "bf16-mixed", "32-true")
SHORT = {"32": "32-true", "bf16": "bf16-mixed"}


def named_precision(requested: Any) -> str:
    """One of PRECISIONS, which 32 and bf16 stand for too. Half precision overflows in autoencoders, and is none.

    Raises:
        UserError: another.
    """
    name = SHORT.get(str(requested), requested)
    if name not in PRECISIONS:
        raise UserError(f"trainer.precision={str(requested)[:80]} is unknown. Choose one of: {', '.join(PRECISIONS)}.")
    return name


def choose_precision(requested: Any, accelerator: str) -> str:
    """`auto` -> bf16-mixed or 32-true; anything else by its name.

    Raises:
        UserError: as `named_precision`.
    """
    if (name := named_precision(requested)) != "auto":
        return name
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed"
    if accelerator != "cpu" and torch.backends.mps.is_available():
        return "32-true"
    gain = bf16_gain()
    chosen = "bf16-mixed" if gain >= GAIN_NEEDED else "32-true"
    print(f"precision: bf16 runs at {gain:.1f}x the speed of fp32 on this CPU; training in {chosen}")
    return chosen


def bf16_gain(repeats: int = 12) -> float:
    """Time of a convolution's forward and backward pass in fp32, over that in bf16 autocast; the best of `repeats`."""
    layer, x = nn.Conv2d(128, 128, 3, padding=1), torch.randn(128, 128, 8, 8)
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats + 1):
        for enabled in times:  # interleaved: what else the machine does meets both
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = layer(x)
            y.float().square().sum().backward()
            times[enabled].append(time.perf_counter() - start)
    return min(times[False][1:]) / min(times[True][1:])
