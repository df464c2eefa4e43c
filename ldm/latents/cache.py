"""Cache of encoded latents: the posterior moments of every image in a memory-mapped file, with a contract.

The cache stores moments rather than a single sample, so z_raw is sampled and standardised each time a batch is read.
The contract records which weights, images and transform produced the latents. It is checked wherever latents are used.
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
from ldm.latents.encoding import MOMENTS_FILE, Encode, NonFiniteLatentsError, check_moments, encode_moments

REMEDY = "Delete that folder. The latents will be encoded again."


class LatentData:
    """Posterior moments of every image, memory-mapped as float32 [N, views, 2, C, h, w].

    View 0 is the original image. View 1, if present, is its horizontal flip. The axis of length 2 contains the mean and
    the log-variance.
    """

    def __init__(self, path: Path, contract: LatentContract, images: ImageData) -> None:
        self.path, self.contract = path, contract
        self.moments = read_array(path / MOMENTS_FILE)
        self.train_indices, self.val_indices = images.train_indices, images.val_indices

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of one latent."""
        return self.moments.shape[-3:]

    def batch(self, indices: Any, view: int = 0) -> tuple[Tensor, Tensor]:
        """Return the posterior mean and log-variance for these images, each [b, C, h, w]."""
        moments = torch.from_numpy(np.array(self.moments[np.asarray(indices), view]))
        return moments[:, 0], moments[:, 1]


def latents_folder(contract: LatentContract, cache_dir: Path | str | None = None) -> Path:
    """Return the cache folder for this contract.

    The folder names of older ldm versions contain only part of the contract. Such a folder is used if its contract.json
    matches.
    """
    cache = Path(cache_dir or default_cache_dir()).expanduser()
    folder = cache / f"latents-{contract.key}"
    legacy_folder = cache / f"latents-{contract.key.rpartition('-')[0]}{'-flip' * contract.flip}"
    return legacy_folder if not folder.exists() and _has_contract(legacy_folder, contract) else folder


def open_latents(
    encode: Encode,
    contract: LatentContract,
    images: ImageData,
    *,
    cache_dir: Path | str | None = None,
    batch_size: int = 64,
) -> LatentData:
    """Open the latent cache. If it does not exist, encode the training and validation images first.

    If encoding was interrupted, it resumes after the last complete chunk. A lock ensures that only one process encodes
    the images. If the moments file was modified after its last verification, its SHA-256 digests are checked again.

    Args:
        encode: Maps images [b, 3, H, W] in [-1, 1] to the mean and log-variance, each [b, C, h, w].

    Raises:
        UserError: The cache does not match its contract or was modified, the disk is full, or a latent is not finite.
    """
    folder = latents_folder(contract, cache_dir)
    if not folder.exists():
        with cache_lock(folder):
            if not folder.exists():
                _encode(folder, encode, contract, images, batch_size)
    if not (folder / CONTRACT_FILE).is_file():
        raise UserError(f"{folder} has no {CONTRACT_FILE}, so its latents cannot be identified. {REMEDY}")
    contract.check(LatentContract.load(folder), "this run", str(folder))
    check_moments(folder)
    latents, expected = LatentData(folder, contract, images), _shape(contract, images)
    if latents.moments.shape != expected or latents.moments.dtype != contract.dtype:
        actual = f"{latents.moments.dtype} {latents.moments.shape}"
        raise UserError(f"{folder} contains {actual}, but its contract requires {contract.dtype} {expected}. {REMEDY}")
    return latents


def verify_latents(images: ImageData) -> Iterator[Path]:
    """Verify the digests of all cached latents of these images, and yield each verified folder.

    Raises:
        UserError: A cache was modified. The message lists the affected images.
    """
    for folder in sorted(images.path.parent.glob("latents-*")):
        if LatentContract.load(folder).data_fingerprint == images.fingerprint:
            check_moments(folder, every_byte=True)
            yield folder


def _shape(contract: LatentContract, images: ImageData) -> tuple[int, ...]:
    side = contract.resolution // contract.factor
    return len(images), 1 + contract.flip, 2, contract.channels, side, side


def _encode(folder: Path, encode: Encode, contract: LatentContract, images: ImageData, batch_size: int) -> None:
    """Encode into `.<folder>.unfinished`, and rename that folder to `folder` when it is complete.

    If the call is interrupted, a later call continues with the unfinished folder.
    """
    partial_folder = folder.with_name(f".{folder.name}.unfinished")
    if partial_folder.exists() and not _has_contract(partial_folder, contract):
        shutil.rmtree(partial_folder)
    shape, partial_file = _shape(contract, images), partial_folder / MOMENTS_FILE
    required = 4 * int(np.prod(shape)) - (partial_file.stat().st_size if partial_file.is_file() else 0)
    free = shutil.disk_usage(folder.parent).free
    if required > free:
        rule = f"has {free / 1e9:.1f} GB free, but the latents need {required / 1e9:.1f} GB. Free some disk space"
        raise InputError("cache_dir", folder.parent, rule)
    try:
        if not partial_folder.exists():
            partial_folder.mkdir()
            contract.save(partial_folder)
        clear_partials(partial_folder)
        encode_moments(partial_folder, encode, images, shape, contract.dtype, batch_size)
        sync(partial_folder)
        partial_folder.replace(folder)
        sync(folder.parent)
    except NonFiniteLatentsError:
        shutil.rmtree(partial_folder)
        raise
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        kept = f"Finished chunks are kept in {partial_folder}"
        rule = f"is on a full disk. {kept}. Free some space, then rerun the command to resume"
        raise InputError("cache_dir", folder.parent, rule) from error


def _has_contract(folder: Path, contract: LatentContract) -> bool:
    try:
        return LatentContract.load(folder) == contract
    except UserError:
        return False
