"""What the training loop adds to a no-op step: our Trainer with its callbacks against a bare loop, interleaved."""

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
    import torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import CSVLogger

    from ldm.data.loaders import train_loader
    from ldm.training.callbacks import Budget, EMACallback, ProgressBar
    from ldm.training.module import TrainingModule
    from ldm.training.stage import OptimizerFactory

    class NoOp(TrainingModule):
        def training_step(self, batch: object, batch_idx: int) -> dict[str, torch.Tensor]:
            self.next_generator()
            loss = self.trained.weight.sum()
            if self.logs_now:
                self.log("train/loss", loss.detach())
            return {"loss": loss}

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
