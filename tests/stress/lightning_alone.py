"""Baseline for docs/reliability.md: how Lightning's Trainer and ModelCheckpoint handle the same faults.

python tests/stress/lightning_alone.py        prints one line per fault, in about a minute
"""

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Denoiser(LightningModule):
    """A minimal denoiser, trained on shuffled data with random noise."""

    def __init__(self, bad_step: int | None = None, width: int = 64) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, 16))
        self.bad_step = bad_step

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        noise = torch.randn_like(batch[0])
        loss = (self.network(batch[0] + noise) - noise).square().mean()
        return loss * float("nan") if self.global_step == self.bad_step else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class StopAt(Callback):
    """Stop training after a given step, optionally by sending a signal, as a scheduler would."""

    def __init__(self, step: int, signal_to_send: signal.Signals | None = None) -> None:
        self.step, self.signal_to_send = step, signal_to_send

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            if self.signal_to_send is None:
                trainer.should_stop = True
            else:
                os.kill(os.getpid(), self.signal_to_send)


def fit(
    folder: Path, *callbacks: Callback, resume: Path | None = None, max_steps: int = 20, **options: Any
) -> Denoiser:
    """Train for `max_steps` steps, in epochs of 8 steps, with a checkpoint every 5 steps."""
    seed_everything(0, verbose=False)
    module = Denoiser(**options)
    data = TensorDataset(torch.randn(64, 16))
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=5, save_last=True, save_top_k=-1)
    trainer = Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        callbacks=[checkpoints, *callbacks],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=8, shuffle=True), ckpt_path=resume)
    return module


def start_fit(folder: Path, arguments: str) -> subprocess.Popen[bytes]:
    """Start `fit` with these arguments in a separate process."""
    code = f"from lightning_alone import *; fit(Path({str(folder)!r}), {arguments})"
    output = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=output, stderr=output)


def digest(module: nn.Module) -> str:
    weights = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    return hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:12]


def check_resume(folder: Path) -> str:
    expected_digest = digest(fit(folder / "uninterrupted"))
    fit(folder / "stopped", StopAt(13))
    last_checkpoint = folder / "stopped" / "last.ckpt"
    step = torch.load(last_checkpoint, weights_only=True)["global_step"]
    resumed_digest = digest(fit(folder / "stopped", resume=last_checkpoint))
    verdict = "same" if resumed_digest == expected_digest else "different"
    digests = f"{expected_digest}, {resumed_digest}"
    return f"stopped after step 13, resumed from last.ckpt (step {step}): {verdict} hash ({digests})"


def check_sigterm(folder: Path) -> str:
    code = start_fit(folder, "StopAt(4, signal.SIGTERM)").wait(timeout=120)
    files = sorted(file.name for file in folder.glob("*.ckpt"))
    return f"SIGTERM at step 4: exit code {code}, checkpoints left: {', '.join(files) or 'none'}"


def check_partial_checkpoint(folder: Path) -> str:
    """Poll the size of a 200 MB checkpoint while it is being saved to a different disk from the temporary files."""
    sizes: list[int] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else folder) as other_disk:
        process = start_fit(Path(other_disk), "max_steps=5, width=500_000")
        while process.poll() is None:
            sizes += [file.stat().st_size for file in Path(other_disk).glob("*.ckpt")]
            time.sleep(0.001)
    full_size = max(sizes)
    num_partial = sum(size < full_size for size in sizes)
    return f"checkpoint of {full_size / 1e6:.0f} MB during its save: incomplete in {num_partial} of {len(sizes)} polls"


def check_damaged_checkpoint(folder: Path) -> str:
    fit(folder)
    checkpoint = folder / "last.ckpt"
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    try:
        fit(folder, resume=checkpoint, max_steps=25)
    except Exception as error:  # any exception is a result here
        return f"one bit flipped in the newest checkpoint: {type(error).__name__}; the previous one is not tried"
    return "one bit flipped in the newest checkpoint: resumed from it without a warning"


def check_nan_loss(folder: Path) -> str:
    module = fit(folder, bad_step=7)
    num_nan = sum(int((~parameter.isfinite()).sum()) for parameter in module.parameters())
    total = sum(parameter.numel() for parameter in module.parameters())
    return f"NaN loss at step 7 of 20: {num_nan} of {total} weights are NaN at the end"


def check_two_processes(folder: Path) -> str:
    """Start two training runs in the same folder at the same time."""
    processes = [start_fit(folder, "max_steps=400") for _ in range(2)]
    codes = [process.wait(timeout=120) for process in processes]
    count = len(list(folder.glob("*.ckpt")))
    return f"two processes in one folder: exit codes {codes}, no warning, {count} checkpoints from both runs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"lightning {lightning.__version__}, torch {torch.__version__}")
    checks = (check_resume, check_sigterm, check_partial_checkpoint, check_damaged_checkpoint, check_nan_loss)
    for check in (*checks, check_two_processes):
        with tempfile.TemporaryDirectory() as folder:
            print(f"{check.__name__.removeprefix('check_')}: {check(Path(folder))}", flush=True)


if __name__ == "__main__":
    main()
