"""Training speed: images per second, floating-point operations per second, and model FLOPs utilisation (MFU)."""

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
"""Peak dense bf16 throughput with float32 accumulation, in TFLOP/s, by words in the GPU name reported by CUDA.

The first match is used. The values are from NVIDIA's data sheets, which give the values with sparsity (twice as
high), and, for GeForce, from NVIDIA's architecture papers on Ampere GA102, Ada and RTX Blackwell. We do not use the
table in `lightning.fabric.utilities.throughput`, because its values for H100 NVL and H200 include sparsity.
"""


def peak_flops(gpu: str) -> float | None:
    """Return the peak bf16 throughput of a GPU in FLOP/s, or None if the GPU is not in the table.

    Only complete words match, so an L40 does not match L4. MIG instances and Ti, D and laptop models never match.
    """
    words = f" {gpu.replace('-', ' ')} "
    if " MIG " in words:
        return None
    matches = (name for name in PEAK_TFLOPS if f" {name} " in words)
    name = next((name for name in matches if "GeForce" not in name or words.endswith(f" {name} ")), None)
    return None if name is None else 1e12 * PEAK_TFLOPS[name]


@dataclass(frozen=True)
class Speed:
    """Converts images per second to FLOP/s and utilisation.

    Args:
        flops_per_image: Floating-point operations per training image, without (False) and with (True) a discriminator.
        peak: Peak FLOP/s summed over all GPUs, or None if unknown.
    """

    flops_per_image: Mapping[bool, float]
    peak: float | None

    def metrics(self, images_per_s: float, adversarial_on: bool = False) -> dict[str, float]:
        """Return `tflops_per_s` and `mfu`, the model FLOPs utilisation, which does not count recomputation.

        Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
        """
        if not (flops := self.flops_per_image.get(adversarial_on, 0.0) * images_per_s):
            return {}
        return {"tflops_per_s": flops / 1e12} | ({"mfu": flops / self.peak} if self.peak else {})


def measure_speed(trainer: Trainer, stage: Stage, num_images: int = 2) -> Speed:
    """Count the floating-point operations of a training step on a few images."""
    device, autocast = trainer.strategy.root_device, trainer.precision_plugin.forward_context
    module = stage.module.to(device)
    indices = stage.images.train_indices[:num_images]
    batch = module.transfer_batch_to_device(stage.fetch(indices), device, 0)
    flops_by_mode = module.measure_each_mode(lambda: count_flops(lambda: module.trial_step(batch, autocast)))
    per_image = {adversarial_on: flops / len(indices) for adversarial_on, flops in flops_by_mode.items()}
    peak = peak_flops(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
    return Speed(per_image, peak and peak * trainer.world_size)


def count_flops(step: Callable[[], Any]) -> float:
    """Count the operations of matrix products, convolutions and attention while `step` runs, including backward passes.

    `step` runs in eager mode with unfused attention, because torch does not count compiled code or fused attention on
    CPUs. The state of the random number generators is restored afterwards.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    counter = FlopCounterMode(display=False)
    eager_mode, unfused_attention = torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH)
    with torch.random.fork_rng(devices), eager_mode, unfused_attention, counter:
        step()
    return float(counter.get_total_flops())


_has_earlier_job = False
"""True if an earlier training job has run in this process."""


def reset_peak_memory(*, is_first_job: bool) -> None:
    """Reset the peak memory, so that the peak excludes earlier jobs of a multirun."""
    global _has_earlier_job
    _has_earlier_job = not is_first_job
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gb() -> float | None:
    """Return the peak GPU memory of this training run in GB or, without a GPU, the peak RAM of the process.

    Without a GPU, return None on Windows and after earlier jobs in this process, because the peak RAM cannot be reset.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if _has_earlier_job or sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Print a two-column table of labels and values."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


def describe_device(trainer: Trainer) -> str:
    """Return the name and number of the GPUs, or the number of CPU threads."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()} x {trainer.world_size}"
    return f"{device.type}, {torch.get_num_threads()} threads"


def estimate_duration(trainer: Trainer, stage: Stage, budget: Budget, batch_size: int, step: int) -> str:
    """Describe the training that remains at `step`, with its duration or number of steps estimated from trial steps."""
    module = stage.module.to(trainer.strategy.root_device)
    batch = module.transfer_batch_to_device(stage.fetch(stage.images.train_indices[:batch_size]), module.device, 0)
    seconds = module.measure_step(batch, trainer.precision_plugin.forward_context) * trainer.accumulate_grad_batches
    duration = budget.expected_duration(step, seconds)
    if budget.max_steps > 0:
        return f"about {duration}, without validation"
    assert budget.max_time_s is not None
    steps = float(f"{max(0.0, budget.max_time_s - budget.spent_s) / seconds:.2g}")
    return f"{duration}, for up to about {steps:,.0f} steps"
