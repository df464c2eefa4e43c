"""Fixtures for training a module with a single linear layer."""

from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from ldm.data.loaders import train_loader, val_loader
from ldm.training.modules.base import TrainingModule
from ldm.training.optim.factory import OptimizerFactory


class Line(TrainingModule):
    """Fits y = A x + b to y = x with noisy x. Records the noise of each batch and the weights at each validation."""

    def __init__(self, lr: float = 1.0, build=torch.optim.SGD) -> None:
        torch.manual_seed(0)
        super().__init__(torch.nn.Linear(2, 2), OptimizerFactory(partial(build, lr=lr)), seed=0)
        self.batches: list[tuple[int, float]] = []
        self.validated_weights: list[torch.Tensor] = []

    def losses(self, x, draws):
        noise = draws.randn(x.shape)
        self.batches.append((self._trainer.global_step if self._trainer else -1, noise.sum().item()))
        return {"loss": (self.trained(x + 0.1 * noise) - x).square().mean()}

    def validation_step(self, x, batch_idx):
        self.validated_weights.append(self.trained.weight.detach().clone())


@pytest.fixture
def make_module():
    """The class `Line`, called as make_module(lr=1.0, build=SGD)."""
    return Line


@pytest.fixture
def fit(tmp_path):
    """fit(module, callbacks=(), *, start=0, ...): fit a module on the CPU from step `start` and return the trainer."""

    def fit(module, callbacks=(), *, batch_size=4, start=0, ckpt_path=None, **options) -> Trainer:
        data = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
        trainer = Trainer(
            **{
                "accelerator": "cpu",
                "max_epochs": -1,
                "callbacks": list(callbacks),
                "default_root_dir": tmp_path,
                "logger": False,
                "check_val_every_n_epoch": None,
                "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,
                **options,
            }
        )

        def fetch(indices: np.ndarray, epochs: np.ndarray | None = None) -> torch.Tensor:
            return data[torch.from_numpy(indices)]

        accumulate = options.get("accumulate_grad_batches", 1)
        order = {"batch_size": batch_size * accumulate, "seed": 0, "start": start, "accumulate": accumulate}
        batches = train_loader(fetch, np.arange(28), **order)
        held_out = val_loader(fetch, np.arange(28, 32), batch_size=4)
        trainer.fit(module, batches, held_out, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    return fit
