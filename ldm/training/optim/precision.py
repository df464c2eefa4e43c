"""Training precision: bf16 on GPUs; on a CPU, whichever of bf16 and fp32 is faster in a short benchmark."""

import time
from typing import Any

import torch
from torch import nn

from ldm.errors import UserError

MIN_BF16_SPEEDUP = 1.1
PRECISIONS = ("auto", "bf16-mixed", "32-true")
ALIASES = {"32": "32-true", "bf16": "bf16-mixed"}


def normalise_precision(requested: Any) -> str:
    """Return a precision as one of PRECISIONS. fp16 is not supported because autoencoders overflow in fp16.

    Raises:
        UserError: The precision is unknown.
    """
    name = ALIASES.get(str(requested), requested)
    if name not in PRECISIONS:
        raise UserError(f"trainer.precision={str(requested)[:80]} is unknown. Choose one of: {', '.join(PRECISIONS)}.")
    return name


def choose_precision(requested: Any, accelerator: str) -> str:
    """Choose bf16-mixed or 32-true if the precision is "auto", and normalise any other precision.

    Raises:
        UserError: The precision is unknown.
    """
    if (name := normalise_precision(requested)) != "auto":
        return name
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed"
    if accelerator != "cpu" and torch.backends.mps.is_available():
        return "32-true"
    speedup = measure_bf16_speedup()
    precision = "bf16-mixed" if speedup >= MIN_BF16_SPEEDUP else "32-true"
    print(f"precision: bf16 runs at {speedup:.1f}x the speed of fp32 on this CPU; training in {precision}")
    return precision


def measure_bf16_speedup(repeats: int = 12) -> float:
    """Return the speed of a convolution (forward and backward) in bf16 autocast relative to fp32.

    Each speed is that of the fastest of `repeats` runs.
    """
    layer, x = nn.Conv2d(128, 128, 3, padding=1), torch.randn(128, 128, 8, 8)
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats + 1):
        for enabled in times:  # interleaved, so that background load affects both equally
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = layer(x)
            y.float().square().sum().backward()
            times[enabled].append(time.perf_counter() - start)
    return min(times[False][1:]) / min(times[True][1:])
