"""Latents as data: every image encoded once to its posterior's moments, in a memory-mapped cache under a contract.

The moments are kept, not one frozen draw: z_raw is sampled and standardised whenever a batch is read. The
contract says which weights, images and transform the latents come from; it is checked wherever they are used.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ldm.data.images import ImageData, default_cache_dir
from ldm.errors import UserError
from ldm.untrusted import read_array, read_json, to_dataclass

CONTRACT_FILE = "contract.json"
CONTRACT_FORMAT = 1


@dataclass(frozen=True)
class LatentContract:
    """What latents are: two sides that exchange latents must agree in every field."""

    autoencoder_sha256: str
    data_fingerprint: str
    resolution: int
    factor: int
    channels: int
    val_fraction: float
    flip: bool
    dtype: str = "float32"
    format: int = CONTRACT_FORMAT

    @property
    def key(self) -> str:
        """Which latents, in a file's name."""
        return f"{self.autoencoder_sha256[:12]}-{self.data_fingerprint[:12]}" + ("-flip" * self.flip)

    def check(self, other: "LatentContract", here: str, there: str) -> None:
        """Compare with the other side.

        Raises:
            UserError: naming every field that differs, with both sides.
        """
        differing = [
            f"{field.name} is {getattr(self, field.name)} in {here} but {getattr(other, field.name)} in {there}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
        if differing:
            raise UserError(
                f"The latents do not fit: {'; '.join(differing)}. Use the autoencoder and the data that belong "
                "together, or start a new run."
            )

    def save(self, folder: Path) -> None:
        (folder / CONTRACT_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "LatentContract":
        """Read contract.json.

        Raises:
            UserError: missing, damaged, or of another format.
        """
        path = folder / CONTRACT_FILE
        if not path.is_file():
            raise UserError(f"{folder} has no {CONTRACT_FILE}: it does not say which latents it belongs to.")
        content = read_json(path)
        if content.get("format") != CONTRACT_FORMAT:
            raise UserError(
                f"{path} has format {content.get('format')}; this version reads {CONTRACT_FORMAT}. Make it again."
            )
        return to_dataclass(cls, content, path)


class LatentData:
    """The moments of every image, memory-mapped float32 [N, views, 2, C, h, w] (mean, log-variance).

    View 1, where there are two, is the image flipped left to right.
    """

    def __init__(self, path: Path, contract: LatentContract, images: ImageData) -> None:
        self.path, self.contract = path, contract
        self.moments = read_array(path / "moments.npy")
        self.train_indices, self.val_indices = images.train_indices, images.val_indices

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        _, _, _, channels, height, width = self.moments.shape
        return channels, height, width

    def batch(self, indices: Any, view: int = 0) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each [b, C, h, w]."""
        moments = torch.from_numpy(np.array(self.moments[np.asarray(indices), view]))
        return moments[:, 0], moments[:, 1]


def latents_folder(contract: LatentContract, cache_dir: Path | str | None = None) -> Path:
    """Where the cache of these latents is."""
    return Path(cache_dir or default_cache_dir()).expanduser() / f"latents-{contract.key}"


def open_latents(
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    contract: LatentContract,
    images: ImageData,
    *,
    cache_dir: Path | str | None = None,
    batch_size: int = 64,
) -> LatentData:
    """Open the cache of these latents, encoding train and validation images first where it does not exist.

    Args:
        encode: images [b, 3, H, W] in [-1, 1] -> mean and log-variance [b, C, h, w].

    Raises:
        UserError: a cache that breaks its contract, too little disk space, latents that are not finite.
    """
    folder = latents_folder(contract, cache_dir)
    if not (folder / CONTRACT_FILE).is_file():
        if folder.exists():
            raise UserError(
                f"{folder} has no {CONTRACT_FILE}: it does not say which latents it holds. Delete that folder; the "
                "latents will be encoded again."
            )
        _encode(folder, encode, contract, images, batch_size)
    contract.check(LatentContract.load(folder), "this run", str(folder))
    latents = LatentData(folder, contract, images)
    side = contract.resolution // contract.factor
    expected = (len(images), 1 + contract.flip, 2, contract.channels, side, side)
    if latents.moments.shape != expected or latents.moments.dtype != contract.dtype:
        raise UserError(
            f"{folder} holds {latents.moments.dtype} {latents.moments.shape}, but its contract means "
            f"{contract.dtype} {expected}. Delete that folder; the latents will be encoded again."
        )
    return latents


def _encode(
    folder: Path,
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    contract: LatentContract,
    images: ImageData,
    batch_size: int,
) -> None:
    side = contract.resolution // contract.factor
    shape = (len(images), 1 + contract.flip, 2, contract.channels, side, side)
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed, free = 4 * int(np.prod(shape)), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise UserError(
            f"The latents need {needed / 1e9:.1f} GB in {folder.parent}, where {free / 1e9:.1f} GB are free. "
            "Make room, or choose another place with data.cache_dir=."
        )
    # written beside and renamed: a folder of that name is always whole
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        moments = np.lib.format.open_memmap(
            partial / "moments.npy", mode="w+", dtype=np.dtype(contract.dtype), shape=shape
        )
        columns = (
            TextColumn("encoding latents"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, transient=True) as bar:
            task = bar.add_task("", total=len(images))
            for start in range(0, len(images), batch_size):
                indices = range(start, min(start + batch_size, len(images)))
                pixels = images.batch(indices)
                for view in range(shape[1]):
                    encoded = torch.stack(encode(pixels.flip(-1) if view else pixels), dim=1).float().cpu()
                    if not encoded.isfinite().all():
                        raise UserError(
                            f"The autoencoder's latents of images {indices.start} to {indices.stop - 1} are not "
                            "finite: its training diverged. Train it again, with a lower optimizer.lr."
                        )
                    moments[indices.start : indices.stop, view] = encoded.numpy()
                bar.advance(task, len(indices))
        moments.flush()
        del moments
        contract.save(partial)
        if not folder.exists():  # another process may have been faster
            partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def measure(latents: LatentData, indices: np.ndarray, batch_size: int = 4096) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of z_raw ~ N(mean, exp(log_variance)) over these images.

    By the law of total variance: Var z = Var(mean) + E exp(log_variance). float64 throughout.
    """
    zeros = torch.zeros(latents.shape[0], dtype=torch.float64)
    count, total, squares, within = 0, zeros, zeros, zeros
    for start in range(0, len(indices), batch_size):
        for view in range(latents.moments.shape[1]):
            mean, log_variance = latents.batch(indices[start : start + batch_size], view)
            mean, log_variance = mean.double(), log_variance.double()
            count += mean.shape[0] * mean.shape[2] * mean.shape[3]
            total = total + mean.sum((0, 2, 3))
            squares = squares + mean.square().sum((0, 2, 3))
            within = within + log_variance.exp().sum((0, 2, 3))
    average = total / count
    variance = squares / count - average**2 + within / count
    return average.tolist(), variance.clamp(min=1e-12).sqrt().tolist()
