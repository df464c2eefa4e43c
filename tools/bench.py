"""What our code costs beside the bare work: the training loop, and with run= the variational bound. Interleaved."""

import statistics
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from ldm import command


def bench(config: DictConfig) -> None:
    if config.run is None:
        training_loop(config)
    else:
        bound(config)


def bound(config: DictConfig) -> None:
    """All T terms of one image's bound against as many bare calls of the network."""
    import torch

    from ldm.device import choose_device
    from ldm.diffusion.bound import variational_bound
    from ldm.pipeline import sample_generators
    from ldm.run import Run
    from ldm.sampling import Request

    run = Run.open(config.run)
    pipeline = run.pipeline().to(choose_device(config.device))
    num_steps, size, denoiser = pipeline.schedule.num_steps, config.batch_size, pipeline.denoiser()
    z = torch.randn(size, *pipeline.latent_shape, device=pipeline.device)
    condition = {
        name: value.to(pipeline.device)
        for name, value in Request.of_images(pipeline, run.image_data(), np.zeros(1, dtype=int)).condition.items()
    }
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

    bare(), ours()
    rows = [(bare(), ours()) for _ in range(config.blocks)]
    for alone, with_bound in rows:
        print(f"{num_steps} bare calls of the network {alone:.2f} s, all {num_steps} terms {with_bound:.2f} s")
    ratio = statistics.median(with_bound / alone for alone, with_bound in rows)
    print(f"the bound costs {ratio:.3f}x the bare network (median of {config.blocks} blocks, batches of {size})")


def training_loop(config: DictConfig) -> None:
    """Our Trainer with its callbacks on a step that does nothing, against a bare loop."""
    import torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import CSVLogger

    from ldm.data.loaders import train_loader
    from ldm.training.budget import Budget
    from ldm.training.callbacks import EMACallback, ProgressBar
    from ldm.training.module import TrainingModule
    from ldm.training.stage import OptimizerFactory

    class NoOp(TrainingModule):
        def losses(self, batch: object, generator: torch.Generator) -> dict[str, torch.Tensor]:
            return {"loss": self.trained.weight.sum()}

    def make() -> NoOp:
        optimizer = OptimizerFactory(partial(torch.optim.AdamW, lr=1e-3, fused=True))
        return NoOp(torch.nn.Linear(1, 1), optimizer, seed=0)

    def loader() -> torch.utils.data.DataLoader:
        return train_loader(lambda indices: indices, np.arange(1000), batch_size=8, seed=0)

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

    def ours(folder: Path) -> float:
        budget = Budget(max_steps=config.steps, warmup_steps=100)
        trainer = Trainer(
            accelerator="cpu",
            max_steps=config.steps,
            callbacks=[budget, EMACallback(0.999), ProgressBar(budget, 8, 50, "no-op")],
            logger=CSVLogger(folder),
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

    bare()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for block in range(config.blocks):
            rows.append((bare(), ours(Path(folder) / str(block))))
    added = [1000 * (with_loop - alone) for alone, with_loop in rows]
    for alone, with_loop in rows:
        print(f"bare loop {1000 * alone:.3f} ms per step, ours {1000 * with_loop:.3f} ms")
    print(f"the training loop adds {statistics.median(added):.3f} ms to a step (median of {config.blocks} blocks)")


def main() -> None:
    command.run("bench", bench)


if __name__ == "__main__":
    main()
