"""Which precision to train in: bf16 on GPUs; on a CPU, whichever a short measurement finds faster."""

import time

import torch
from torch import nn

from ldm.errors import UserError

GAIN_NEEDED = 1.1


def choose_precision(requested: str, accelerator: str) -> str:
    """`auto` -> bf16-mixed or 32-true; anything else is left as it is."""
    if requested.startswith("16"):
        raise UserError(
            f"trainer.precision={requested}: half precision overflows in autoencoders and cannot be clipped here. "
            "Choose bf16-mixed or 32-true."
        )
    if requested != "auto":
        return requested
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
