"""A minimal stage-1 training module, and helpers to compare training states and record metrics."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger

from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.patch import PatchAutoencoderKL
from ldm.autoencoder.regularisers import KL
from ldm.autoencoder.sampling_decoder import SamplingDecoder
from ldm.training.modules.autoencoder import VAETraining
from ldm.training.optim.factory import OptimizerFactory

STAGE_1 = [
    *("stage=vae", "autoencoder.model.block_out_channels=[32]", "data=image_folder", "data.path=pets"),
    *("data.resolution=16", "data.val_fraction=0.2", "batch_size=8", "trainer=cpu", "trainer.max_time=null"),
    *("trainer.precision=32-true", "logger=csv"),
]
"""Options for training on an image folder named pets."""
COARSE_IMAGES = torch.randn(28, 3, 4, 4, generator=torch.Generator().manual_seed(0)).tanh()
IMAGES = torch.nn.functional.interpolate(COARSE_IMAGES, 16, mode="nearest")
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def make_vae_training(regulariser=KL, adversary=None, optimizer=SGD) -> VAETraining:
    torch.manual_seed(0)
    regularisation = regulariser()
    sizes = {"patch": 2, "latent_channels": 3, "block_out_channels": (8,), "norm_num_groups": 4}
    model = regularisation.build(partial(PatchAutoencoderKL, **sizes), 16)
    model.init_shortcut(IMAGES)
    regularisation.initialise(model, lambda: IMAGES, 0, torch.device("cpu"))
    components = (model, AutoencoderLoss(), regularisation, OptimizerFactory(optimizer))
    return VAETraining(*components, seed=0, flip=True, figures_dir=Path(), adversary=adversary and adversary())


def make_two_phase_training() -> VAETraining:
    """Stage 1 whose second phase, the second half of the budget, trains a sampling decoder."""
    module = make_vae_training()
    module.trained.sampling_decoder = SamplingDecoder(module.trained, [1.0] * 3)
    module.decoder_noise, module.second_phase_at = 0.5, 0.5
    return module


def states_equal(a: Any, b: Any) -> bool:
    """Return True if two nested states are equal, with bit-identical tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(states_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(states_equal, a, b))
    return a == b


class RecordingLogger(Logger):
    """Records logged metrics by step."""

    name, version = "recording", "0"

    def __init__(self) -> None:
        super().__init__()
        self.by_step: dict[int, dict[str, float]] = {}

    def log_hyperparams(self, *_) -> None: ...

    def log_metrics(self, metrics, step) -> None:
        self.by_step.setdefault(step, {}).update(metrics)

    def metric(self, name: str) -> dict[int, float]:
        """Return the values of one metric by step."""
        return {step: row[name] for step, row in self.by_step.items() if name in row}
