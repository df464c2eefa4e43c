"""What Lightning does by itself on the promises of docs/reliability.md: its Trainer with ModelCheckpoint.

python tests/stress/lightning_alone.py        prints one line per promise; about a minute
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
    """Predicts the noise that was added: as small as a model with shuffled data and noise of its own can be."""

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
    """Ends training after a step, as a user or a scheduler would."""

    def __init__(self, step: int, sent: signal.Signals | None = None) -> None:
        self.step, self.sent = step, sent

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            if self.sent is None:
                trainer.should_stop = True
            else:
                os.kill(os.getpid(), self.sent)


def fit(
    folder: Path, *callbacks: Callback, resume: Path | None = None, max_steps: int = 20, **options: Any
) -> Denoiser:
    """20 steps in epochs of 8, a checkpoint every 5."""
    seed_everything(0, verbose=False)
    module = Denoiser(**options)
    data = TensorDataset(torch.randn(64, 16))
    saved = ModelCheckpoint(folder, every_n_train_steps=5, save_last=True, save_top_k=-1)
    trainer = Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        callbacks=[saved, *callbacks],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=8, shuffle=True), ckpt_path=resume)
    return module


def in_process(folder: Path, arguments: str) -> subprocess.Popen[bytes]:
    """`fit` with these arguments in a process of its own."""
    code = f"import lightning_alone as alone; alone.fit(alone.Path({str(folder)!r}), {arguments})"
    here, silent = Path(__file__).parent, subprocess.DEVNULL
    return subprocess.Popen([sys.executable, "-c", code], cwd=here, stdout=silent, stderr=silent)


def digest(module: nn.Module) -> str:
    joined = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    return hashlib.sha256(joined.numpy().tobytes()).hexdigest()[:12]


def resume(folder: Path) -> str:
    whole = digest(fit(folder / "whole"))
    fit(folder / "cut", StopAt(13))
    saved = torch.load(folder / "cut" / "last.ckpt", weights_only=True)["global_step"]
    again = digest(fit(folder / "cut", resume=folder / "cut" / "last.ckpt"))
    verdict = "the same" if whole == again else "another"
    return f"stopped after step 13, resumed from last.ckpt, of step {saved}: {verdict} hash ({whole}, {again})"


def sigterm(folder: Path) -> str:
    code = in_process(folder, "alone.StopAt(4, alone.signal.SIGTERM)").wait(timeout=120)
    saved = sorted(file.name for file in folder.glob("*.ckpt"))
    return f"SIGTERM at step 4: exit code {code}, checkpoints left: {', '.join(saved) or 'none'}"


def partial(folder: Path) -> str:
    """A save of some 200 MB to another disk than that of temporary files, watched: is the file ever too short?"""
    sizes: list[int] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else folder) as other:
        saving = in_process(Path(other), "max_steps=5, width=500_000")
        while saving.poll() is None:
            sizes += [file.stat().st_size for file in Path(other).glob("*.ckpt")]
            time.sleep(0.001)
    whole = max(sizes)
    shorter = sum(size < whole for size in sizes)
    return f"of {len(sizes)} looks at a checkpoint of {whole / 1e6:.0f} MB {shorter} found it shorter than that"


def damaged(folder: Path) -> str:
    fit(folder)
    newest = folder / "last.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    try:
        fit(folder, resume=newest, max_steps=25)
    except Exception as error:  # whatever it is, it is the answer
        return f"one bit flipped in the newest checkpoint: {type(error).__name__}, the one before it is not tried"
    return "one bit flipped in the newest checkpoint: resumed from it without a word"


def not_finite(folder: Path) -> str:
    module = fit(folder, bad_step=7)
    bad = sum(int((~parameter.isfinite()).sum()) for parameter in module.parameters())
    total = sum(parameter.numel() for parameter in module.parameters())
    return f"one loss of NaN at step 7 of 20: {bad} of {total} weights are NaN at the end"


def two_processes(folder: Path) -> str:
    """The second starts while the first trains; both say nothing."""
    both = [in_process(folder, "max_steps=400") for _ in range(2)]
    codes = [process.wait(timeout=120) for process in both]
    return f"two processes in one folder: exit codes {codes}, {len(list(folder.glob('*.ckpt')))} files of both, mixed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"lightning {lightning.__version__}, torch {torch.__version__}")
    for check in (resume, sigterm, partial, damaged, not_finite, two_processes):
        with tempfile.TemporaryDirectory() as folder:
            print(f"{check.__name__}: {check(Path(folder))}", flush=True)


if __name__ == "__main__":
    main()
