"""Which trainings compare latent sizes: one for each size and loss, for equal minutes.

A size f4c16 has C = 16 channels at 1 / f = 1 / 4 of the resolution: C (R / f)^2 values for an image of R x R pixels.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import UserError

MAX_PATCH, WIDTH = 8, 128
"""Up to f = 8 a pixel-unshuffle does it all, and every convolution works at the latent's resolution. On one CPU thread
f8c16 made 2.4 times the steps of a patch of 4 with two levels in equal time, and 20.1 dB instead of 19.7."""
PLAIN = "plain"
LOSSES: dict[str, tuple[str, ...]] = {PLAIN: (), "adversarial": ("perceptual=efficientnet_lite", "adversarial=hinge")}
"""By name, the overrides that turn the autoencoder's own loss into it."""
OWN_KEYS = {"stage", "name", "runs_dir", "resume", "overwrite"}


@dataclass(frozen=True)
class LatentSize:
    """Latents of C channels at 1 / f of the resolution."""

    factor: int
    channels: int

    def __str__(self) -> str:
        return f"f{self.factor}c{self.channels}"

    def num_values(self, resolution: int) -> int:
        return self.channels * (resolution // self.factor) ** 2

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
    """One run of a sweep: a size, a loss, and the overrides that make them, data and budget included."""

    size: LatentSize
    loss: str
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.size}-{self.loss}"

    def folder(self, sweep: Path) -> Path:
        """Its run folder, in the folder of the sweep."""
        return sweep / "vae" / self.name

    def arguments(self, sweep: Path) -> list[str]:
        """The training command's, after the interpreter."""
        return ["-m", "ldm.train", "stage=vae", f"name={self.name}", f"runs_dir={sweep}", *self.overrides]


def parse_sizes(text: str, resolution: int) -> list[LatentSize]:
    """`f4c4,f4c16` for images of `resolution` pixels a side.

    Raises:
        UserError: another form, an f that is no power of 2 or does not divide the resolution, more channels than a
            patch has values, the same size twice.
    """
    sizes: list[LatentSize] = []
    for spec in (part.strip() for part in str(text).split(",")):
        found = re.fullmatch(r"f([1-9]\d*)c([1-9]\d*)", spec)
        if not found:
            raise UserError(
                f"sweep: {spec!r} is no latent size. Write f, the factor, c, the channels: sweep=f4c4,f8c16."
            )
        size = LatentSize(int(found[1]), int(found[2]))
        pixels = 3 * size.factor**2
        if size.factor & (size.factor - 1):
            raise UserError(f"sweep: f = {size.factor} of {spec} must be a power of 2: 1, 2, 4, 8, 16, ...")
        if resolution % size.factor:
            raise UserError(
                f"sweep: f = {size.factor} of {spec} must divide data.resolution={resolution}. Choose a smaller f, or "
                f"data.resolution={max(1, round(resolution / size.factor)) * size.factor}."
            )
        if size.channels > pixels:
            raise UserError(
                f"sweep: {spec} has more channels than the 3 f^2 = {pixels} values of a patch. Choose {pixels} or "
                f"fewer, and fewer than {pixels} to compress."
            )
        if size in sizes:
            raise UserError(f"sweep: {spec} is named twice. Name every size once.")
        sizes.append(size)
    return sizes


def parse_losses(text: str) -> list[str]:
    """`plain`, or `plain,adversarial`.

    Raises:
        UserError: an unknown name, or the same twice.
    """
    names = [part.strip() for part in str(text).split(",")]
    for name in names:
        if name not in LOSSES:
            raise UserError(f"losses={text}: {name!r} is unknown. Choose one or more of: {', '.join(LOSSES)}.")
    if len({*names}) < len(names):
        raise UserError(f"losses={text} names one twice. Name every loss once.")
    return names


def parse_list(text: Any) -> list[str]:
    """`[batch_size=64,optimizer.betas=[0.9,0.95]]` as overrides: split at the commas outside brackets and quotes.

    Raises:
        UserError: brackets that do not match, or a part without a `=`.
    """
    inside = str(text or "").strip()
    if inside.startswith("[") and inside.endswith("]"):
        inside = inside[1:-1]
    parts, depth, quote = [""], 0, ""
    for character in inside:
        if character in "\"'" and quote in ("", character):
            quote = "" if quote else character
        depth += 0 if quote else (character in "[{(") - (character in "]})")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    found = [part.strip() for part in parts if part.strip()]
    if depth or quote or not all("=" in part for part in found):
        raise UserError(f"train={text} must be a list of overrides: train=[batch_size=64,optimizer.lr=1e-3].")
    return found


def format_duration(minutes: Any) -> str:
    """Minutes as HH:MM:SS.

    Raises:
        UserError: no number, or less than a second.
    """
    if type(minutes) not in (int, float) or not 0.5 < 60 * minutes < 100 * 3600 - 0.5:
        raise UserError(f"minutes={minutes} must be a number of minutes, from a second (0.02) to 100 hours.")
    seconds = round(60 * minutes)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def plan_trainings(
    sizes: Sequence[LatentSize], losses: Sequence[str], *, minutes: Any, data: Sequence[str], extra: Sequence[str]
) -> list[SweepTraining]:
    """Every size with every loss.

    Args:
        data: The overrides that choose the data.
        extra: Further overrides of every training.

    Raises:
        UserError: `extra` sets what the sweep sets itself.
    """
    time = f"trainer.max_time={format_duration(minutes)}"
    found = [
        SweepTraining(size, loss, (*data, *size.overrides(), *LOSSES[loss], time, *extra))
        for size in sizes
        for loss in losses
    ]
    named = {
        key for training in found for key in overrides_by_key(training.overrides[: -len(extra) or None])
    } | OWN_KEYS
    for key in overrides_by_key(extra):
        if key in named or key.partition(".")[0] == "data":
            raise UserError(
                f"train=[{key}=...] is set by the sweep itself. Sizes come from sweep=, losses from losses=, time from "
                "minutes=, the data from data= options beside sweep=, the place from name= and runs_dir=."
            )
    return found


def overrides_by_key(overrides: Sequence[str]) -> dict[str, str]:
    """Overrides by key: the last one counts."""
    return {key.lstrip("+~"): value for key, _, value in (override.partition("=") for override in overrides)}
