"""Benchmark the training loop or, with run=, the variational bound or the losses of stage 1."""

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig

from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.regularisers import KL, Unregularised, VectorQuantised
from ldm.cli import main as command
from ldm.data.loaders import train_loader
from ldm.diffusion.bound import variational_bound
from ldm.errors import UserError
from ldm.runs.run import Run
from ldm.runtime.device import choose_device
from ldm.runtime.random import Draws, sample_generators
from ldm.sampling.request import Request
from ldm.training.callbacks.progress import ProgressBar
from ldm.training.modules.autoencoder import VAETraining
from ldm.training.modules.base import TrainingModule
from ldm.training.optim.budget import Budget
from ldm.training.optim.ema import EMACallback
from ldm.training.optim.factory import OptimizerFactory


def bench(config: DictConfig) -> None:
    """`python benchmarks/bench.py`."""
    if config.run is None:
        time_training_loop(config)
    elif (run := Run.open(config.run)).stage == "vae":
        time_stage_1_losses(config, run)
    else:
        time_bound(config, run)


def time_interleaved(blocks: int, *variants: Callable[[], float]) -> list[list[float]]:
    """Call every variant once per block, after a warm-up block. Return the times in seconds, [block][variant]."""
    return [[variant() for variant in variants] for _ in range(blocks + 1)][1:]


def time_stage_1_losses(config: DictConfig, run: Any) -> None:
    """Time a training step of stage 1 with the parts of the loss added one by one."""
    perceptual, adversarial = command.construct(config.perceptual), command.construct(config.adversarial)
    if perceptual is None or adversarial is None:
        raise UserError(
            "The benchmark of a stage=vae run needs both losses, but one of perceptual= and adversarial= is none. "
            "Omit both options to use the defaults."
        )
    device, autoencoder = choose_device(config.device), run.autoencoder()
    images = run.image_data()
    batch = images.batch(images.train_indices[: config.batch_size]).to(device)
    weights = {key: value for key, value in run.config()["autoencoder"]["loss"].items() if key != "_target_"}
    build: dict[str, Any] = {"kl": KL, "none": Unregularised, "vq": lambda: VectorQuantised(autoencoder.codebook_size)}
    module = VAETraining(
        autoencoder.model.train().requires_grad_(True),
        AutoencoderLoss(**weights),
        build[autoencoder.regulariser](),
        OptimizerFactory(partial(torch.optim.AdamW, lr=0.0)),
        seed=0,
        flip=False,
        figures_dir=Path(),
        adversary=adversarial(),
    ).to(device)
    adversary: Any = module.adversary
    optimizer = module.configure_optimizers()
    adversary.move_to(device)
    adversary.lr = 0.0
    accumulate = adversary.accumulate_gradients

    variants = (
        "autoencoder alone",
        "+ perceptual features",
        "+ adversarial loss and its weight",
        "+ update of the discriminator",
    )

    def time_step(num_parts: int) -> float:
        """Time a step with the first `num_parts` of: perceptual loss, adversarial loss, update of the discriminator."""
        module.loss.perceptual = perceptual if num_parts >= 1 else None
        module.adversarial_on, adversary.adaptive_weight.weight = num_parts >= 2, None
        adversary.accumulate_gradients = accumulate if num_parts >= 3 else lambda *_: {}
        draws, start = module.trial_draws(batch), time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=str(run.facts["precision"]).startswith("bf16")):
            loss = module.losses(batch, draws)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if num_parts >= 3:
            adversary.step(decay=1.0)
        loss.item()  # waits for the accelerator
        return time.perf_counter() - start

    torch.set_flush_denormal(True)  # as in training
    rows = time_interleaved(config.blocks, *(partial(time_step, num_parts) for num_parts in range(len(variants))))
    times = [statistics.median(column) for column in zip(*rows, strict=True)]
    print(f"{len(batch)} images of {images.resolution} px, {run.facts['precision']}, median of {config.blocks} blocks")
    for name, seconds in zip(variants, times, strict=True):
        print(f"{name:30} {1000 * seconds:7.1f} ms per step, {seconds / times[0]:.2f}x the autoencoder alone")


def time_bound(config: DictConfig, run: Any) -> None:
    """Time all T terms of the variational bound of one image, compared with T bare network calls."""
    pipeline = run.pipeline().to(choose_device(config.device))
    num_steps, size, denoiser = pipeline.schedule.num_steps, config.batch_size, pipeline.denoiser()
    z = torch.randn(size, *pipeline.latent_shape, device=pipeline.device)
    request = Request.for_images(pipeline, run.image_data(), np.zeros(1, dtype=int))
    condition = {name: value.to(pipeline.device) for name, value in request.condition.items()}
    expanded = {name: value.expand(size, *value.shape[1:]) for name, value in condition.items()}
    t = torch.arange(size, device=pipeline.device)

    def call_network() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            for offset in range(0, num_steps, size):
                n = min(size, num_steps - offset)
                output = pipeline.network(z[:n], t[:n], **{name: value[:n] for name, value in expanded.items()})
            output.cpu()  # waits for the accelerator
        return time.perf_counter() - start

    def evaluate_bound() -> float:
        generators, variance = sample_generators(0, [0]), pipeline.variance
        start = time.perf_counter()
        variational_bound(denoiser, z[:1], condition, generators=generators, variance=variance, batch_size=size)
        return time.perf_counter() - start

    rows = time_interleaved(config.blocks, call_network, evaluate_bound)
    for bare_s, bound_s in rows:
        print(f"{num_steps} bare network calls {bare_s:.2f} s, all {num_steps} terms of the bound {bound_s:.2f} s")
    ratio = statistics.median(bound_s / bare_s for bare_s, bound_s in rows)
    print(f"the bound costs {ratio:.3f}x the bare network (median of {config.blocks} blocks, batches of {size})")


def time_training_loop(config: DictConfig) -> None:
    """Time empty training steps with our Trainer and its callbacks, compared with a bare loop."""

    class NoOp(TrainingModule):
        def losses(self, batch: object, draws: Draws) -> dict[str, torch.Tensor]:
            return {"loss": self.trained.weight.sum()}

    def build() -> NoOp:
        optimizer = OptimizerFactory(partial(torch.optim.AdamW, lr=1e-3, fused=True))
        return NoOp(torch.nn.Linear(1, 1), optimizer, seed=0)

    def loader() -> torch.utils.data.DataLoader:
        return train_loader(lambda indices, epochs: indices, np.arange(1000), batch_size=8, seed=0)

    def run_bare_loop() -> float:
        module, batches = build(), iter(loader())
        optimizer = module.configure_optimizers()
        start = time.perf_counter()
        for _ in range(config.steps):
            next(batches)
            loss = module.trained.weight.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (time.perf_counter() - start) / config.steps

    def run_trainer() -> float:
        budget = Budget(max_steps=config.steps, warmup_steps=100)
        trainer = Trainer(
            accelerator="cpu",
            max_steps=config.steps,
            callbacks=[budget, EMACallback(0.999), ProgressBar(budget, 8, 50, "no-op")],
            logger=CSVLogger(tempfile.mkdtemp(dir=folder)),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
            gradient_clip_val=1.0,
            log_every_n_steps=50,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(build(), loader())
        return budget.elapsed_s / config.steps

    with tempfile.TemporaryDirectory() as folder:
        rows = time_interleaved(config.blocks, run_bare_loop, run_trainer)
    overheads_ms = [1000 * (trainer_s - bare_s) for bare_s, trainer_s in rows]
    for bare_s, trainer_s in rows:
        print(f"bare loop {1000 * bare_s:.3f} ms per step, Trainer {1000 * trainer_s:.3f} ms")
    overhead_ms = statistics.median(overheads_ms)
    print(f"the training loop adds {overhead_ms:.3f} ms per step (median of {config.blocks} blocks)")
