"""Sweep over latent sizes: one training run per size and loss, run sequentially with equal time budgets.

Each autoencoder can be followed by a short stage 2 with the same small network, so that its samples can be compared.

The size f4c16 has C = 16 channels at 1 / f = 1 / 4 of the resolution, so an R x R image has C (R / f)^2 latent
values. Each run executes an ordinary training command in a separate process. A sweep folder contains:

runs/sweeps/<name>/  sweep.json  sweep.png  vae/<size>-<loss>/  diffusion/<size>-<loss>/ (run folders)
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ldm.cli.main import child_environment
from ldm.errors import UserError
from ldm.rules import Count, Number, checked
from ldm.runs.run import Run
from ldm.runtime import child, shell, signals
from ldm.runtime.paths import RUN_FILE

MAX_PATCH, WIDTH = 8, 128
"""Maximum patch size, and number of channels at every level.

Up to f = 8, a pixel-unshuffle does all the downsampling and every convolution runs at the latent resolution. On one
CPU thread, f8c16 completed 2.4 times as many steps in the same time as with patch=4 and two levels, and reached 20.1 dB
instead of 19.7 dB.
"""
LOSSES = {"plain": (), "adversarial": ("perceptual=efficientnet_lite", "adversarial=hinge")}
"""Overrides of the training command for each loss."""
Loss = Annotated[Literal["plain", "adversarial"], Field()]
MAX_MINUTES = 5999
Minutes = Annotated[Number, Field(ge=0.02, le=MAX_MINUTES)]
"""Between one second and 100 hours."""
NO_SAMPLING_DECODER = "autoencoder.decoder_noise=0"
"""Option of a sweep without samples, which needs no decoder for them."""
REPLACED = ("stage=", "runs_dir=")
"""Start of the options that a run of the sweep sets itself."""


@dataclass(frozen=True)
class LatentSize:
    """Latents of C channels at 1 / f of the resolution."""

    factor: int
    channels: int

    def __str__(self) -> str:
        return f"f{self.factor}c{self.channels}"

    def overrides(self) -> list[str]:
        """Return overrides for the training command such that f = patch * 2^(levels - 1)."""
        patch = min(self.factor, MAX_PATCH)
        levels = int(math.log2(self.factor // patch)) + 1
        return [
            "autoencoder=patch",
            f"autoencoder.model.patch={patch}",
            f"autoencoder.model.latent_channels={self.channels}",
            f"autoencoder.model.block_out_channels=[{','.join([str(WIDTH)] * levels)}]",
        ]


@dataclass(frozen=True)
class SweepRun:
    """One training run of a sweep.

    Args:
        sweep: Sweep folder.
        minutes: Time budget.
        overrides: All overrides of the training command, including the data and the time budget.
        stage: "vae" or "diffusion".
    """

    size: LatentSize
    loss: str
    sweep: Path
    minutes: float
    overrides: tuple[str, ...]
    stage: str = "vae"

    @property
    def name(self) -> str:
        return f"{self.size}-{self.loss}"

    @property
    def folder(self) -> Path:
        return self.sweep / self.stage / self.name

    def command(self) -> list[str]:
        """Return the Python arguments that start the run, or resume it if its folder exists."""
        location = [f"name={self.name}", f"runs_dir={self.sweep}"]
        resume = ["resume=true"] if (self.folder / RUN_FILE).is_file() else []
        return ["-m", "ldm.train", f"stage={self.stage}", *self.overrides, *location, *resume]

    def is_finished(self) -> bool:
        """Return True if the run exists and has finished.

        Raises:
            UserError: If the folder contains a run with different options.
        """
        if not (self.folder / RUN_FILE).is_file():
            return False
        run = Run.open(self.folder)
        if differing := {f"stage={self.stage}", *self.overrides} ^ set(run.facts.get("options", [])):
            options = ", ".join(sorted(differing)).replace("=", " ")
            raise UserError(
                f"{self.folder} was trained with different options: {options}. Choose a new name= or delete the folder."
            )
        return run.finished


@checked
def parse_sizes(text: str, resolution: Count) -> list[LatentSize]:
    """Parse latent sizes such as `f4c4,f4c16` for images of `resolution` x `resolution` pixels.

    Raises:
        UserError: If a size is not valid for this resolution.
    """
    sizes = {}
    for spec in (part.strip() for part in text.split(",")):
        match = re.fullmatch(r"f([1-9]\d*)c([1-9]\d*)", spec)
        factor, channels = map(int, match.groups()) if match else (0, 0)
        if not match or factor & (factor - 1) or resolution % factor or channels > 3 * factor**2:
            raise UserError(
                f"sweep: {spec!r} is not a valid latent size for data.resolution={resolution}. Write f and a power of "
                "2 that divides the resolution, then c and the number of channels, at most 3 f^2. For example: "
                "sweep=f4c4,f8c16."
            )
        sizes[spec] = LatentSize(factor, channels)
    return list(sizes.values())


def parse_list(text: str | None) -> list[str]:
    """Split a list such as `[batch_size=64,optimizer.betas=[0.9,0.95]]` at commas outside inner brackets and quotes.

    Raises:
        UserError: If an item contains no `=`.
    """
    items = re.sub(r"^\[(.*)\]$", r"\1", (text or "").strip())
    overrides = [item.strip() for item in re.findall(r"""(?:[^,\["']|\[[^]]*\]|"[^"]*"|'[^']*')+""", items)]
    if not all("=" in override for override in overrides):
        raise UserError(
            f"train={text} must be a list of overrides, for example train=[batch_size=64,optimizer.lr=1e-3]."
        )
    return overrides


@checked
def plan_sweep(
    sizes: Sequence[LatentSize], losses: list[Loss], sweep: Path, minutes: Minutes, common: Sequence[str]
) -> list[SweepRun]:
    """Return one run for each combination of size and loss.

    Args:
        sweep: Sweep folder.
        common: Overrides for all runs: data options and the user's own overrides.
    """
    time = f"trainer.max_time={as_time(minutes)}"
    return [
        SweepRun(size, loss, sweep, minutes, (*size.overrides(), *LOSSES[loss], time, *common))
        for size in sizes
        for loss in losses
    ]


@checked
def plan_stage_2(runs: Sequence[SweepRun], sample_minutes: Minutes) -> list[SweepRun]:
    """Return the training of a small diffusion model on the autoencoder of each run; all runs must be finished."""
    stage_2 = []
    for run in runs:
        options = [option for option in Run.open(run.folder).facts["next_options"] if not option.startswith(REPLACED)]
        overrides = (*options, "network=unet_demo", f"vae={run.folder}", f"trainer.max_time={as_time(sample_minutes)}")
        stage_2.append(replace(run, stage="diffusion", minutes=sample_minutes, overrides=overrides))
    return stage_2


def as_time(minutes: float) -> str:
    """Format minutes as HH:MM:SS."""
    seconds = round(60 * minutes)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def run_sweep(runs: Sequence[SweepRun]) -> None:
    """Start new training runs, resume interrupted ones, and skip finished ones.

    Raises:
        UserError: As raised by `is_finished` before any run starts, or if a run fails. After a failure, the remaining
            runs are not started.
        Interrupted: If the user stops the sweep. The current run has saved a checkpoint.
    """
    remaining = [run for run in runs if not run.is_finished()]
    print(f"{len(runs)} training runs, {len(runs) - len(remaining)} of them already finished")
    for number, run in enumerate(remaining):
        minutes = (len(remaining) - number) * run.minutes
        print(
            f"\n{run.stage}/{run.name}, {number + 1} of {len(remaining)}: at most {minutes:g} minutes left", flush=True
        )
        command = run.command()
        try:
            exit_code = child.run_python(command, child_environment())
        except signals.Interrupted as error:
            raise signals.Interrupted(error.signal, f"{error}. Run the same command to resume.") from error
        if exit_code:
            raise UserError(
                f"The training run {run.stage}/{run.name} failed with exit code {exit_code}; its error message is "
                f"above. Its command was: {shell.python(*command)}. Fix the error, then repeat the sweep to continue."
            )
