"""Latents as data: every image encoded once to its posterior's moments, in a memory-mapped cache under a contract.

The moments are kept, not one frozen draw: z_raw is sampled and standardised whenever a batch is read. The
contract says which weights, images and transform the latents come from; it is checked wherever they are used.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.images import ImageData, default_cache_dir
from ldm.errors import InputError, UserError
from ldm.files.atomic import clear_partials, sync
from ldm.files.lock import cache_lock
from ldm.files.reading import DISK_FULL
from ldm.files.untrusted import read_array
from ldm.latents.contract import CONTRACT_FILE, LatentContract
from ldm.latents.encoding import MOMENTS_FILE, Encode, NotFinite, check_moments, encode_moments

REMEDY = "Delete that folder; the latents will be encoded again."


class LatentData:
    """The moments of every image, memory-mapped float32 [N, views, 2, C, h, w] (mean, log-variance).

    View 1, where there are two, is the image flipped left to right.
    """

    def __init__(self, path: Path, contract: LatentContract, images: ImageData) -> None:
        self.path, self.contract = path, contract
        self.moments = read_array(path / MOMENTS_FILE)
        self.train_indices, self.val_indices = images.train_indices, images.val_indices

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        return self.moments.shape[-3:]

    def batch(self, indices: Any, view: int = 0) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each [b, C, h, w]."""
        moments = torch.from_numpy(np.array(self.moments[np.asarray(indices), view]))
        return moments[:, 0], moments[:, 1]


def latents_folder(contract: LatentContract, cache_dir: Path | str | None = None) -> Path:
    """Where the cache of these latents is. One from before its name covered the whole contract is used as it is."""
    cache = Path(cache_dir or default_cache_dir()).expanduser()
    folder = cache / f"latents-{contract.key}"
    earlier = cache / f"latents-{contract.key.rpartition('-')[0]}{'-flip' * contract.flip}"
    return earlier if not folder.exists() and _is_of(earlier, contract) else folder


def open_latents(
    encode: Encode,
    contract: LatentContract,
    images: ImageData,
    *,
    cache_dir: Path | str | None = None,
    batch_size: int = 64,
) -> LatentData:
    """Open the cache of these latents, encoding train and validation images first where it does not exist.

    An encoding that was interrupted goes on where it was. A second process waits for the first. What was written to
    since it was last compared with its SHA-256 is compared again.

    Args:
        encode: images [b, 3, H, W] in [-1, 1] -> mean and log-variance [b, C, h, w].

    Raises:
        UserError: a cache that breaks its contract or whose bytes changed, too little room, latents not finite.
    """
    folder = latents_folder(contract, cache_dir)
    if not folder.exists():
        with cache_lock(folder):
            if not folder.exists():
                _encode(folder, encode, contract, images, batch_size)
    if not (folder / CONTRACT_FILE).is_file():
        raise UserError(f"{folder} has no {CONTRACT_FILE}, which says what latents it holds. {REMEDY}")
    contract.check(LatentContract.load(folder), "this run", str(folder))
    check_moments(folder)
    latents, expected = LatentData(folder, contract, images), _shape(contract, images)
    if latents.moments.shape != expected or latents.moments.dtype != contract.dtype:
        found = f"{latents.moments.dtype} {latents.moments.shape}"
        raise UserError(f"{folder} holds {found}, but its contract means {contract.dtype} {expected}. {REMEDY}")
    return latents


def verify_latents(images: ImageData) -> Iterator[Path]:
    """Compare every byte of the latents of these images with what was written; yields their folders.

    Raises:
        UserError: naming the images whose latents changed.
    """
    for folder in sorted(images.path.parent.glob("latents-*")):
        if LatentContract.load(folder).data_fingerprint == images.fingerprint:
            check_moments(folder, every_byte=True)
            yield folder


def _shape(contract: LatentContract, images: ImageData) -> tuple[int, ...]:
    side = contract.resolution // contract.factor
    return len(images), 1 + contract.flip, 2, contract.channels, side, side


def _encode(folder: Path, encode: Encode, contract: LatentContract, images: ImageData, batch_size: int) -> None:
    """Fill `.<folder>.unfinished`, which a later call finds again, and give it the folder's name."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    if unfinished.exists() and not _is_of(unfinished, contract):
        shutil.rmtree(unfinished)
    shape, done = _shape(contract, images), unfinished / MOMENTS_FILE
    needed = 4 * int(np.prod(shape)) - (done.stat().st_size if done.is_file() else 0)
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        rule = f"has {free / 1e9:.1f} GB free, but the latents need {needed / 1e9:.1f} GB: free some space"
        raise InputError("cache_dir", folder.parent, rule)
    try:
        if not unfinished.exists():
            unfinished.mkdir()
            contract.save(unfinished)
        clear_partials(unfinished)
        encode_moments(unfinished, encode, images, shape, contract.dtype, batch_size)
        sync(unfinished)
        unfinished.replace(folder)
        sync(folder.parent)
    except NotFinite:
        shutil.rmtree(unfinished)
        raise
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        rule = f"filled up. What is done is kept in {unfinished}: free some space, and the same command continues there"
        raise InputError("cache_dir", folder.parent, rule) from error


def _is_of(folder: Path, contract: LatentContract) -> bool:
    try:
        return LatentContract.load(folder) == contract
    except UserError:
        return False
