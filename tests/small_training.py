"""The smallest stage 1 that trains, and what tests of training compare and collect."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger

from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.patch import PatchAutoencoderKL
from ldm.autoencoder.regularisers import KL
from ldm.training.modules.autoencoder import VAETraining
from ldm.training.optim.factory import OptimizerFactory

STAGE_1 = [
    *("stage=vae", "autoencoder.model.block_out_channels=[32]", "data=image_folder", "data.path=pets"),
    *("data.resolution=16", "data.val_fraction=0.2", "batch_size=8", "trainer=cpu", "trainer.max_time=null"),
    *("trainer.precision=32-true", "logger=csv"),
]
"""Options, on a folder of images named pets."""
SMALL = torch.randn(28, 3, 4, 4, generator=torch.Generator().manual_seed(0)).tanh()
IMAGES = torch.nn.functional.interpolate(SMALL, 16, mode="nearest")
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def vae(regulariser=KL, adversary=None, optimizer=SGD) -> VAETraining:
    torch.manual_seed(0)
    rule = regulariser()
    sizes = {"patch": 2, "latent_channels": 3, "block_out_channels": (8,), "norm_num_groups": 4}
    model = rule.build(partial(PatchAutoencoderKL, **sizes), 16)
    model.init_shortcut(IMAGES)
    rule.start(model, lambda: IMAGES, 0, torch.device("cpu"))
    parts = (model, AutoencoderLoss(), rule, OptimizerFactory(optimizer))
    return VAETraining(*parts, seed=0, flip=True, pictures=Path(), adversary=adversary and adversary())


def same(a: Any, b: Any) -> bool:
    """Bit for bit, of nested states with tensors in them."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Rows(Logger):
    """What is logged, by step."""

    name, version = "rows", "0"

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, dict[str, float]] = {}

    def log_hyperparams(self, *_) -> None: ...

    def log_metrics(self, metrics, step) -> None:
        self.found.setdefault(step, {}).update(metrics)

    def of(self, name: str) -> dict[int, float]:
        """One metric by step."""
        return {step: row[name] for step, row in self.found.items() if name in row}
