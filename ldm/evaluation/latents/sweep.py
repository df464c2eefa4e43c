"""Which trainings compare latent sizes: one for each size and loss, for equal minutes, one after the other.

A size f4c16 has C = 16 channels at 1 / f = 1 / 4 of the resolution: C (R / f)^2 values for an image of R x R pixels.
Each training is a command like any other, in a process of its own. The folder of a sweep:

runs/sweeps/<name>/  sweep.json  sweep.png  vae/<size>-<loss>/, run folders
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ldm.cli.main import environment_of_children
from ldm.errors import UserError
from ldm.rules import Count, Number, checked
from ldm.runs.run import Run
from ldm.runtime import child, shell, signals
from ldm.runtime.paths import RUN_FILE

MAX_PATCH, WIDTH = 8, 128
"""Up to f = 8 a pixel-unshuffle does it all, and every convolution works at the latent's resolution. On one CPU thread
f8c16 made 2.4 times the steps of a patch of 4 with two levels in equal time, and 20.1 dB instead of 19.7."""
LOSSES = {"plain": (), "adversarial": ("perceptual=efficientnet_lite", "adversarial=hinge")}
"""By name, the overrides that turn the autoencoder's own loss into it."""
Loss = Annotated[Literal["plain", "adversarial"], Field()]
MOST_MINUTES = 5999
Minutes = Annotated[Number, Field(ge=0.02, le=MOST_MINUTES)]
"""From a second to 100 hours."""


@dataclass(frozen=True)
class LatentSize:
    """Latents of C channels at 1 / f of the resolution."""

    factor: int
    channels: int

    def __str__(self) -> str:
        return f"f{self.factor}c{self.channels}"

    def overrides(self) -> list[str]:
        """Of the training command: f = patch * 2^(levels - 1)."""
        patch = min(self.factor, MAX_PATCH)
        levels = int(math.log2(self.factor // patch)) + 1
        return [
            "autoencoder=patch",
            f"autoencoder.model.patch={patch}",
            f"autoencoder.model.latent_channels={self.channels}",
            f"autoencoder.model.block_out_channels=[{','.join([str(WIDTH)] * levels)}]",
        ]


@dataclass(frozen=True)
class SweepTraining:
    """One run of a sweep.

    Args:
        sweep: The folder of the sweep.
        minutes: The budget.
        overrides: What makes it that size and that loss, data and budget included.
    """

    size: LatentSize
    loss: str
    sweep: Path
    minutes: float
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.size}-{self.loss}"

    @property
    def folder(self) -> Path:
        return self.sweep / "vae" / self.name

    def command(self) -> list[str]:
        """The training command's arguments, after the interpreter: it begins, or goes on where it was stopped."""
        place = [f"name={self.name}", f"runs_dir={self.sweep}"]
        again = ["resume=true"] if (self.folder / RUN_FILE).is_file() else []
        return ["-m", "ldm.train", "stage=vae", *self.overrides, *place, *again]

    def is_finished(self) -> bool:
        """Whether its run is there and has ended.

        Raises:
            UserError: its folder holds a run of other options.
        """
        if not (self.folder / RUN_FILE).is_file():
            return False
        run = Run.open(self.folder)
        if other := {"stage=vae", *self.overrides} ^ set(run.facts.get("options", [])):
            differ = ", ".join(sorted(other)).replace("=", " ")
            raise UserError(
                f"{self.folder} was trained with other options: {differ}. Choose another name=, or delete that folder."
            )
        return run.finished


@checked
def parse_sizes(text: str, resolution: Count) -> list[LatentSize]:
    """`f4c4,f4c16` for images of `resolution` pixels a side.

    Raises:
        UserError: naming the one that is no size of such images, and the rule.
    """
    sizes = {}
    for spec in (part.strip() for part in text.split(",")):
        found = re.fullmatch(r"f([1-9]\d*)c([1-9]\d*)", spec)
        factor, channels = map(int, found.groups()) if found else (0, 0)
        if not found or factor & (factor - 1) or resolution % factor or channels > 3 * factor**2:
            raise UserError(
                f"sweep: {spec!r} is no latent size for data.resolution={resolution}. Write f, a power of 2 that "
                "divides it, and c, the channels, 3 f^2 at most: sweep=f4c4,f8c16."
            )
        sizes[spec] = LatentSize(factor, channels)
    return list(sizes.values())


def parse_list(text: str | None) -> list[str]:
    """`[batch_size=64,optimizer.betas=[0.9,0.95]]` as overrides: split at the commas outside brackets and quotes.

    Raises:
        UserError: a part without a `=`.
    """
    inside = re.sub(r"^\[(.*)\]$", r"\1", (text or "").strip())
    found = [part.strip() for part in re.findall(r"""(?:[^,\["']|\[[^]]*\]|"[^"]*"|'[^']*')+""", inside)]
    if not all("=" in part for part in found):
        raise UserError(f"train={text} must be a list of overrides: train=[batch_size=64,optimizer.lr=1e-3].")
    return found


@checked
def plan_trainings(
    sizes: Sequence[LatentSize], losses: list[Loss], sweep: Path, minutes: Minutes, common: Sequence[str]
) -> list[SweepTraining]:
    """Every size with every loss.

    Args:
        sweep: The folder of the sweep.
        common: Overrides of every training: the data, and what the user adds.
    """
    time = f"trainer.max_time={as_time(minutes)}"
    return [
        SweepTraining(size, loss, sweep, minutes, (*size.overrides(), *LOSSES[loss], time, *common))
        for size in sizes
        for loss in losses
    ]


def as_time(minutes: float) -> str:
    """Minutes as HH:MM:SS."""
    seconds = round(60 * minutes)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def run_trainings(trainings: Sequence[SweepTraining]) -> None:
    """Begin what is new, continue what was interrupted, keep what is finished.

    Raises:
        UserError: as `is_finished` says, before any training; or one of them failed, and the others were not begun.
        Interrupted: the user stopped it; the training of that moment has saved its checkpoint.
    """
    left = [training for training in trainings if not training.is_finished()]
    print(f"{len(trainings)} trainings, of which {len(trainings) - len(left)} are finished and kept")
    for number, training in enumerate(left):
        minutes = (len(left) - number) * training.minutes
        print(f"\n{training.name}, {number + 1} of {len(left)}: {minutes:g} minutes are left at most", flush=True)
        command = training.command()
        try:
            code = child.run_python(command, environment_of_children())
        except signals.Interrupted as stopped:
            raise signals.Interrupted(stopped.signal, f"{stopped}. The same command goes on from there.") from stopped
        if code:
            raise UserError(
                f"The training {training.name} ended with exit code {code}, for the reason that it gave above. Its "
                f"command was: {shell.python(*command)}. When the reason is mended, the same sweep goes on."
            )
