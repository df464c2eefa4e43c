"""Prepared images from any source: a memory-mapped uint8 array, captions, labels and a train/validation split.

A cache folder contains `images.npy` [N, H, W, 3], `index.json` (captions, labels, hashes, licence, preparation options,
SHA-256 digests) and `quarantine.jsonl` (the images that could not be read, with reasons).
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ldm.data.cache import (
    FORMAT_VERSION,
    IMAGES_FILE,
    INDEX_FILE,
    check_quarantine,
    find_cache_damage,
    fingerprint,
    images_fingerprint,
    quarantine_file,
    read_quarantine,
    shorten,
)
from ldm.data.classes import NO_CLASSES, older_numberings
from ldm.data.pixels import MAX_PIXELS, BitDepth, Resize
from ldm.data.prepare import fill_cache
from ldm.data.sources.base import Record, Source
from ldm.errors import InputError, UserError
from ldm.files.digest import sha256_of_values
from ldm.files.untrusted import check_fields, read_array, read_json
from ldm.rules import Count, Integer, Number, checked

__all__ = ["ImageData", "Record", "Source", "default_cache_dir", "prepare", "split_by_hash", "to_uint8"]

Resolution = Annotated[Integer, Field(ge=1, le=16_384)]
"""Image height and width in pixels."""
Fraction = Annotated[Number | Integer, Field(ge=0, lt=1)]
"""A fraction in [0, 1). The integer 0 stays an integer, because latent cache names depend on its type."""


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """Prepared, memory-mapped image dataset. Pickling stores only the path, so that workers share memory pages."""

    path: Path
    name: str
    licence: str | None
    images: np.ndarray  # uint8 [N, H, W, 3]
    names: list[str]
    captions: list[str | None] | None
    """The first caption of each image."""
    more_captions: dict[int, list[str]]
    """Image index -> captions after the first, for images with several captions."""
    labels: list[int | None] | None
    class_names: list[str] | None
    fingerprint: str
    """SHA-256 digest of the ordered content hashes, captions, labels and the transform."""
    train_indices: np.ndarray
    val_indices: np.ndarray
    val_fraction: float
    num_skipped: int
    profiles: dict[str, int]
    """Number of images by colour profile status: `converted` to sRGB, or `unreadable`."""
    images_fingerprint: str
    """SHA-256 digest of the content hashes in order and the transform, without captions and labels."""
    preparation: dict[str, Any]
    """Counts made when the images were prepared, see `ldm.data.accounting`; empty for older caches."""

    @classmethod
    def open(
        cls, path: Path | str, val_fraction: float | None = 0.05, expected_fingerprint: str | None = None
    ) -> "ImageData":
        """Open a cache folder written by `prepare`, without verifying its digests (`prepare` does that).

        Args:
            expected_fingerprint: If an earlier version would have given this fingerprint to the same images because it
                numbered their classes differently, the classes are numbered like that.

        Raises:
            UserError: the cache is damaged.
        """
        path = Path(path)
        try:
            index, images = read_json(path / INDEX_FILE), read_array(path / IMAGES_FILE)
            _check_index(index, images, path)
        except UserError as error:
            remedy = "Delete the folder. The next training run with the same data options will create it again."
            raise UserError(f"{path} cannot be opened ({error}). {remedy}") from error
        if expected_fingerprint not in (None, index["fingerprint"]):
            for labels, class_names in older_numberings(index["labels"], index["class_names"], index["names"]):
                if fingerprint(older := index | {"labels": labels, "class_names": class_names}) == expected_fingerprint:
                    index = older | {"fingerprint": expected_fingerprint}
        train_indices, val_indices = split_by_hash(index["hashes"], val_fraction)
        preparation, digest = index.get("accounting", {}), images_fingerprint(index)
        caption_lists = {i: texts for i, texts in enumerate(index["captions"] or ()) if isinstance(texts, list)}
        for i, texts in caption_lists.items():
            index["captions"][i] = texts[0]
        return cls(
            path=path,
            images=images,
            more_captions={i: texts[1:] for i, texts in caption_lists.items()},
            train_indices=train_indices,
            val_indices=val_indices,
            val_fraction=0 if val_fraction is None else val_fraction,
            profiles=index.get("profiles", {}),
            images_fingerprint=digest,
            preparation=preparation,
            **{key: index[key] for key in _INDEX_FIELDS},
        )

    def __len__(self) -> int:
        return len(self.images)

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageData.open, (self.path, self.val_fraction, self.fingerprint)

    @property
    def resolution(self) -> int:
        return self.images.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.images.nbytes

    def batch(self, indices: Any) -> Tensor:
        """Return the images at these indices as float32 [b, 3, H, W] in [-1, 1]."""
        pixels = torch.from_numpy(np.asarray(self.images[np.asarray(indices, dtype=np.int64)]))
        images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return images.div_(127.5).sub_(1)

    @property
    def conditioning(self) -> str:
        """Conditioning that these images support: "text", "class" or "none"."""
        conditions = {"text": self.captions, "class": self.labels}
        return next((kind for kind, values in conditions.items() if values is not None and None not in values), "none")

    def quarantine(self) -> list[dict[str, str]]:
        """Return the name, reason and error class of each image that was skipped because it could not be read."""
        return read_quarantine(quarantine_file(self.path))

    def require_captions(self) -> list[str]:
        """Return the first caption of every image. Raise a UserError if any captions are missing."""
        remedy = "Add the missing captions to the caption files or to the caption column"
        return _all_present(self, "text", "captions", self.captions, remedy)

    def captions_of(self, index: int) -> list[str]:
        """Return all captions of an image, in order."""
        caption = self.captions[index] if self.captions is not None else None
        return [] if caption is None else [caption, *self.more_captions.get(int(index), [])]

    def require_labels(self) -> list[int]:
        """Return the class label of every image. Raise a UserError if any labels are missing."""
        remedy = "Sort the images into one folder per class, or select the dataset column that contains the labels"
        notes = self.preparation.get("notes", [])
        if self.labels is None and (reason := next((note for note in notes if note.startswith(NO_CLASSES)), None)):
            rule = f"needs at least two class folders that contain all images, but there are {reason}"
            raise InputError("conditioning", "class", rule)
        return _all_present(self, "class", "class labels", self.labels, remedy)


_INDEX_FIELDS = ("name", "licence", "names", "captions", "labels", "class_names", "fingerprint", "num_skipped")


def _check_index(index: dict[str, Any], images: np.ndarray, path: Path) -> None:
    kinds = {key: kind for key, kind in get_type_hints(ImageData).items() if key in _INDEX_FIELDS}
    kinds |= {"hashes": list[str], "captions": list[str | Annotated[list[str], Field(min_length=1)] | None] | None}
    check_fields(index, kinds, path / INDEX_FILE)
    check_fields(index, {"profiles": dict, "accounting": dict}, path / INDEX_FILE, required=False)
    lists = [index[key] for key in ("names", "hashes", "captions", "labels") if index[key] is not None]
    is_square = images.ndim == 4 and images.shape[1:] == (images.shape[1], images.shape[1], 3)
    if images.dtype != np.uint8 or not is_square or any(len(values) != len(images) for values in lists):
        actual = f"{IMAGES_FILE} is {images.dtype} {images.shape}"
        raise UserError(f"{actual}, but {INDEX_FILE} lists {len(index['names'])} images")


def _all_present(data: ImageData, condition: str, kind: str, values: list[Any] | None, remedy: str) -> list[Any]:
    values = values or [None] * len(data)
    if missing := [name for name, value in zip(data.names, values, strict=True) if value is None]:
        rule = f"needs {kind} for every image, but {len(missing)} of {len(data)} images have no {kind}"
        raise InputError("conditioning", condition, f"{rule}: {shorten(missing)}. {remedy}")
    return values


def verify_images(data: ImageData) -> Path:
    """Verify every byte of the prepared images against the recorded digests, and return the cache folder.

    Raises:
        UserError: the cache is damaged. The message names the images that changed.
    """
    if (damage := find_cache_damage(data.path, every_byte=True)) is not None:
        raise UserError(f"{data.path}: {damage}. Delete the folder. The next run will prepare the images again.")
    return data.path


def to_uint8(images: Tensor) -> Tensor:
    """Convert images in [-1, 1] to uint8 of the same shape, rounded and clamped. Inverts `ImageData.batch`."""
    return ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def default_cache_dir() -> Path:
    """Return the folder in LDM_CACHE, or `ldm` in the platform's cache folder."""
    if folder := os.environ.get("LDM_CACHE"):
        return Path(folder).expanduser()
    platform = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return (Path(platform) if platform else Path.home() / ".cache") / "ldm"


def split_by_hash(hashes: list[str], val_fraction: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Return training and validation indices, split by the first 32 bits of each image's hash.

    With val_fraction=None, all images are training images, and a single one is enough.

    Adding images never moves an existing image across the split, and copies of an image stay on the same side. If one
    side would be empty, it gets the image closest to the threshold.
    """
    if val_fraction is None:
        return np.arange(len(hashes)), np.arange(0)
    if len(set(hashes)) < 2:
        raise UserError("Training needs at least 2 different images: one for training and one for validation.")
    is_val = np.array([int(digest[:8], 16) / 2**32 < val_fraction for digest in hashes])
    if not is_val.any():
        is_val = np.array(hashes) == min(hashes)
    elif is_val.all():
        is_val = np.array(hashes) != max(hashes)
    return np.flatnonzero(~is_val).astype(np.int64), np.flatnonzero(is_val).astype(np.int64)


@checked
def prepare(
    source: Source,
    *,
    resolution: Resolution,
    cache_dir: Path | str | None = None,
    resize: Resize = "crop",
    val_fraction: Fraction | None = 0.05,
    max_bad_fraction: Fraction | None = 0.01,
    max_pixels: Count = MAX_PIXELS,
    bit_depth: Annotated[BitDepth, Field()] = 16,
    progress: bool = True,
) -> ImageData:
    """Decode and resize all images of a source into the cache, or open the existing cache.

    An existing cache is verified against its SHA-256 digests, and prepared again if it is damaged.

    Args:
        val_fraction: Fraction held out for validation; None: no image, so that a single one is enough.
        max_bad_fraction: Maximum fraction of unreadable images, which are skipped; None: no limit.
        max_pixels: Images with more pixels are skipped without decoding them.
        bit_depth: Number of bits used in 16-bit grey images.

    Raises:
        UserError: an option is invalid, too many images are unreadable, fewer than 2 images remain, or the disk does
            not have enough free space.
    """
    transform: dict[str, Any] = {"resolution": resolution, "resize": resize}
    if bit_depth != 16:  # the default is omitted so that keys of older caches stay valid
        transform["bit_depth"] = bit_depth
    spec = {"format": FORMAT_VERSION, "identity": source.identity(), "transform": transform}
    if max_pixels != MAX_PIXELS:
        spec["max_pixels"] = max_pixels
    key = sha256_of_values(spec)[:12]
    folder = Path(cache_dir or default_cache_dir()).expanduser() / f"{source.name}-{key}"
    if find_cache_damage(folder) is not None:
        fill_cache(
            folder, source, spec, max_bad_fraction=max_bad_fraction, max_pixels=max_pixels, show_progress=progress
        )
    data = ImageData.open(folder, val_fraction)
    check_quarantine(data.num_skipped, len(data), max_bad_fraction, quarantine_file(folder))
    return data
