"""How fast training is, in images, in floating-point operations and as a share of what the GPU can do."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm.training.optim.budget import Budget
from ldm.training.stages.base import Stage

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.5,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.5,
    "H100": 989.5,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "GeForce RTX 5090": 209.5,
    "GeForce RTX 4090": 165.2,
    "GeForce RTX 3090": 71.0,
}
"""Dense bf16 operations per second with float32 sums, in units of 1e12, by the words that CUDA names a GPU with.

The first that fits counts. Source: NVIDIA's data sheets of these GPUs, which state twice as much with sparsity; for
GeForce the tables in its Ampere GA102, Ada and RTX Blackwell GPU architecture papers. Not Lightning's own table
(`lightning.fabric.utilities.throughput`), whose numbers for H100 NVL and H200 are those with sparsity.
"""


def peak_flops(gpu: str) -> float | None:
    """Floating-point operations per second that a GPU of this name can do in bf16, where the table has it.

    Whole words: an L40 is no L4, and a part of a GPU, a Ti, D or laptop version is another GPU.
    """
    words = f" {gpu.replace('-', ' ')} "
    if " MIG " in words:
        return None
    found = (name for name in PEAK_TFLOPS if f" {name} " in words)
    name = next((name for name in found if "GeForce" not in name or words.endswith(f" {name} ")), None)
    return None if name is None else 1e12 * PEAK_TFLOPS[name]


@dataclass(frozen=True)
class Speed:
    """What a rate of images per second means.

    Args:
        flops_per_image: Floating-point operations of a step, by whether the discriminator takes part.
        peak: What all GPUs together can do per second, where that is known.
    """

    flops_per_image: Mapping[bool, float]
    peak: float | None

    def figures(self, images_per_s: float, playing: bool = False) -> dict[str, float]:
        """tflops_per_s, and mfu, the share of the peak ("model FLOPs utilisation").

        Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B; operations that a recomputation adds do not count.
        """
        if not (flops := self.flops_per_image.get(playing, 0.0) * images_per_s):
            return {}
        return {"tflops_per_s": flops / 1e12} | ({"mfu": flops / self.peak} if self.peak else {})


def measure_speed(trainer: Trainer, stage: Stage, num_images: int = 2) -> Speed:
    """Count the operations of a step on a few images."""
    device, autocast = trainer.strategy.root_device, trainer.precision_plugin.forward_context
    module = stage.module.to(device)
    chosen = stage.images.train_indices[:num_images]
    batch = module.transfer_batch_to_device(stage.fetch(chosen), device, 0)
    counted = module.each_way(lambda: count_flops(lambda: module.try_step(batch, autocast)))
    per_image = {playing: flops / len(chosen) for playing, flops in counted.items()}
    peak = peak_flops(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
    return Speed(per_image, peak and peak * trainer.world_size)


def count_flops(step: Callable[[], Any]) -> float:
    """Floating-point operations of `step`'s matrix products, convolutions and attention, forward and backward.

    Attention is done the plain way and nothing is compiled meanwhile: torch counts nothing of CPUs' fused
    attention, nor of what is compiled. Random numbers go on as if nothing had been counted.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    counter = FlopCounterMode(display=False)
    eager, plain = torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH)
    with torch.random.fork_rng(devices), eager, plain, counter:
        step()
    return float(counter.get_total_flops())


_shared = False
"""Whether another training was in this process before."""


def begin_peak_memory(*, first: bool) -> None:
    """From here on peak memory is this training's, not that of an earlier job of a multirun."""
    global _shared
    _shared = not first
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gb() -> float | None:
    """The most memory that this training held on the GPU where there is one, else its process in RAM.

    None where RAM's peak, which cannot be set back, may be that of an earlier training, and on Windows.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if _shared or sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Labels and values under a title."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


def describe_device(trainer: Trainer) -> str:
    """The GPUs by name, or the CPU's threads."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()} x {trainer.world_size}"
    return f"{device.type}, {torch.get_num_threads()} threads"


def time_expected(trainer: Trainer, stage: Stage, budget: Budget, batch_size: int, step: int) -> str:
    """How long training will take from `step` on; a budget in steps is timed on one batch of `batch_size`."""
    if budget.max_steps <= 0:
        return budget.expected(step, 0.0)
    module = stage.module.to(trainer.strategy.root_device)
    batch = module.transfer_batch_to_device(stage.fetch(stage.images.train_indices[:batch_size]), module.device, 0)
    seconds = module.measure_step(batch, trainer.precision_plugin.forward_context)
    return f"about {budget.expected(step, seconds * trainer.accumulate_grad_batches)}, without validation"
