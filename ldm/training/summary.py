"""What is said before and after training: tables, the device, the time."""

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from ldm.training.budget import Budget
from ldm.training.stage import Stage


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
