"""What our code costs beside the bare work: the training loop, and with run= the bound or the losses of stage 1."""

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
    if config.run is None:
        training_loop(config)
    elif (run := Run.open(config.run)).stage == "vae":
        stage_1_losses(config, run)
    else:
        bound(config, run)


def seconds_by_turns(blocks: int, *variants: Callable[[], float]) -> list[list[float]]:
    """What each variant says that it took, one list per block, after a round that does not count."""
    return [[variant() for variant in variants] for _ in range(blocks + 1)][1:]


def stage_1_losses(config: DictConfig, run: Any) -> None:
    """A step of stage 1 with one part of the loss more each time."""
    perceptual, adversarial = command.construct(config.perceptual), command.construct(config.adversarial)
    if perceptual is None or adversarial is None:
        raise UserError("A run of stage=vae is timed with every part: leave perceptual= and adversarial= to be some.")
    device, autoencoder = choose_device(config.device), run.autoencoder()
    images = run.image_data()
    batch = images.batch(images.train_indices[: config.batch_size]).to(device)
    weights = {key: value for key, value in run.config()["autoencoder"]["loss"].items() if key != "_target_"}
    rules: dict[str, Any] = {"kl": KL, "none": Unregularised, "vq": lambda: VectorQuantised(autoencoder.codebook_size)}
    module = VAETraining(
        autoencoder.model.train().requires_grad_(True),
        AutoencoderLoss(**weights),
        rules[autoencoder.regulariser](),
        OptimizerFactory(partial(torch.optim.AdamW, lr=0.0)),
        seed=0,
        flip=False,
        pictures=Path(),
        adversary=adversarial(),
    ).to(device)
    adversary: Any = module.adversary
    optimizer = module.configure_optimizers()
    adversary.join(device)
    adversary.lr = 0.0
    learn = adversary.learn

    variants = (
        "autoencoder alone",
        "+ perceptual features",
        "+ adversarial term and lambda",
        "+ discriminator's own step",
    )

    def step(num_parts: int) -> float:
        """A step with the first `num_parts` of perceptual loss, adversarial loss and discriminator."""
        module.loss.perceptual = perceptual if num_parts >= 1 else None
        module.playing, adversary.balance.weight = num_parts >= 2, None
        adversary.learn = learn if num_parts >= 3 else lambda *_: {}
        draws, start = module.trial_draws(batch), time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=str(run.facts["precision"]).startswith("bf16")):
            loss = module.losses(batch, draws)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if num_parts >= 3:
            adversary.step(decay=1.0)
        loss.item()  # an accelerator has finished only now
        return time.perf_counter() - start

    torch.set_flush_denormal(True)  # as training does
    rows = seconds_by_turns(config.blocks, *(partial(step, num_parts) for num_parts in range(len(variants))))
    times = [statistics.median(column) for column in zip(*rows, strict=True)]
    print(f"{len(batch)} images of {images.resolution} px, {run.facts['precision']}, median of {config.blocks} blocks")
    for name, seconds in zip(variants, times, strict=True):
        print(f"{name:30} {1000 * seconds:7.1f} ms a step, {seconds / times[0]:.2f}x the autoencoder alone")


def bound(config: DictConfig, run: Any) -> None:
    """All T terms of one image's bound against as many bare calls of the network."""
    pipeline = run.pipeline().to(choose_device(config.device))
    num_steps, size, denoiser = pipeline.schedule.num_steps, config.batch_size, pipeline.denoiser()
    z = torch.randn(size, *pipeline.latent_shape, device=pipeline.device)
    request = Request.of_images(pipeline, run.image_data(), np.zeros(1, dtype=int))
    condition = {name: value.to(pipeline.device) for name, value in request.condition.items()}
    repeated = {name: value.expand(size, *value.shape[1:]) for name, value in condition.items()}
    t = torch.arange(size, device=pipeline.device)

    def bare() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            for first in range(0, num_steps, size):
                n = min(size, num_steps - first)
                output = pipeline.network(z[:n], t[:n], **{name: value[:n] for name, value in repeated.items()})
            output.cpu()  # an accelerator has finished only now
        return time.perf_counter() - start

    def ours() -> float:
        generators, variance = sample_generators(0, [0]), pipeline.variance
        start = time.perf_counter()
        variational_bound(denoiser, z[:1], condition, generators=generators, variance=variance, batch_size=size)
        return time.perf_counter() - start

    rows = seconds_by_turns(config.blocks, bare, ours)
    for alone, with_bound in rows:
        print(f"{num_steps} bare calls of the network {alone:.2f} s, all {num_steps} terms {with_bound:.2f} s")
    ratio = statistics.median(with_bound / alone for alone, with_bound in rows)
    print(f"the bound costs {ratio:.3f}x the bare network (median of {config.blocks} blocks, batches of {size})")


def training_loop(config: DictConfig) -> None:
    """Our Trainer with its callbacks on a step that does nothing, against a bare loop."""

    class NoOp(TrainingModule):
        def losses(self, batch: object, draws: Draws) -> dict[str, torch.Tensor]:
            return {"loss": self.trained.weight.sum()}

    def make() -> NoOp:
        optimizer = OptimizerFactory(partial(torch.optim.AdamW, lr=1e-3, fused=True))
        return NoOp(torch.nn.Linear(1, 1), optimizer, seed=0)

    def loader() -> torch.utils.data.DataLoader:
        return train_loader(lambda indices, epochs: indices, np.arange(1000), batch_size=8, seed=0)

    def bare() -> float:
        module, batches = make(), iter(loader())
        optimizer = module.configure_optimizers()
        start = time.perf_counter()
        for _ in range(config.steps):
            next(batches)
            loss = module.trained.weight.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (time.perf_counter() - start) / config.steps

    def ours() -> float:
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
            trainer.fit(make(), loader())
        return budget.elapsed_s / config.steps

    with tempfile.TemporaryDirectory() as folder:
        rows = seconds_by_turns(config.blocks, bare, ours)
    added = [1000 * (with_loop - alone) for alone, with_loop in rows]
    for alone, with_loop in rows:
        print(f"bare loop {1000 * alone:.3f} ms per step, ours {1000 * with_loop:.3f} ms")
    print(f"the training loop adds {statistics.median(added):.3f} ms to a step (median of {config.blocks} blocks)")
