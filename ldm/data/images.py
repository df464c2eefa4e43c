"""Prepared images, whatever their source: a memory-mapped uint8 array with captions, labels and a split.

A cache folder holds `images.npy` [N, H, W, 3], `index.json` (captions, labels, hashes, licence, how it was
made, SHA-256 of it all) and `quarantine.jsonl` (what could not be read, and why).
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
    damage,
    quarantine_of,
    read_quarantine,
    shorten,
)
from ldm.data.pixels import MAX_PIXELS, Resize
from ldm.data.prepare import fill_cache
from ldm.data.sources.base import Record, Source
from ldm.errors import InputError, UserError
from ldm.files.digest import sha256_of_values
from ldm.files.untrusted import check_fields, read_array, read_json
from ldm.rules import Count, Number, Whole, checked

__all__ = ["ImageData", "Record", "Source", "default_cache_dir", "prepare", "split_by_hash", "to_uint8"]

Resolution = Annotated[Whole, Field(ge=1, le=16_384)]
"""Pixels a side."""
BelowOne = Annotated[Number | Whole, Field(ge=0, lt=1)]
"""A part of a whole, but not all of it. A 0 stays a whole number, for caches of latents are named after it."""


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """A prepared set of images, memory-mapped. It pickles as its path, so that workers share the pages."""

    path: Path
    name: str
    licence: str | None
    images: np.ndarray  # uint8 [N, H, W, 3]
    names: list[str]
    captions: list[str | None] | None
    """The first caption of each image."""
    more_captions: dict[int, list[str]]
    """By image, the captions after its first, where it has several."""
    labels: list[int | None] | None
    class_names: list[str] | None
    fingerprint: str
    """SHA-256 of the content hashes in order, the captions, the labels and the transform."""
    train_indices: np.ndarray
    val_indices: np.ndarray
    val_fraction: float
    num_skipped: int
    profiles: dict[str, int]
    """Images per outcome of their colour profile: `converted` to sRGB, or `unreadable`."""

    @classmethod
    def open(cls, path: Path | str, val_fraction: float = 0.05) -> "ImageData":
        """Open a cache folder that `prepare` left. Its bytes are not compared: `prepare` does that.

        Raises:
            UserError: it is damaged.
        """
        path = Path(path)
        try:
            index, images = read_json(path / INDEX_FILE), read_array(path / IMAGES_FILE)
            _check(index, images, path)
        except UserError as error:
            remedy = "Delete that folder and start any training with the same data options: it is made again."
            raise UserError(f"{path} cannot be opened ({error}). {remedy}") from error
        train_indices, val_indices = split_by_hash(index["hashes"], val_fraction)
        several = {i: texts for i, texts in enumerate(index["captions"] or ()) if isinstance(texts, list)}
        for i, texts in several.items():
            index["captions"][i] = texts[0]
        return cls(
            path=path,
            images=images,
            more_captions={i: texts[1:] for i, texts in several.items()},
            train_indices=train_indices,
            val_indices=val_indices,
            val_fraction=val_fraction,
            profiles=index.get("profiles", {}),
            **{key: index[key] for key in _KEPT},
        )

    def __len__(self) -> int:
        return len(self.images)

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageData.open, (self.path, self.val_fraction)

    @property
    def resolution(self) -> int:
        return self.images.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.images.nbytes

    def batch(self, indices: Any) -> Tensor:
        """The images at these indices as float32 [b, 3, H, W] in [-1, 1]."""
        pixels = torch.from_numpy(np.asarray(self.images[np.asarray(indices, dtype=np.int64)]))
        images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return images.div_(127.5).sub_(1)

    @property
    def conditioning(self) -> str:
        """What a model of these images can be conditioned on: text, class or none."""
        known = {"text": self.captions, "class": self.labels}
        return next((kind for kind, values in known.items() if values is not None and None not in values), "none")

    def describe_profiles(self) -> str:
        """What became of the images' colour profiles; empty where none needed anything."""
        parts = {"converted": "converted to sRGB", "unreadable": "unreadable, treated as sRGB"}
        return ", ".join(f"{self.profiles[kind]} {text}" for kind, text in parts.items() if kind in self.profiles)

    def quarantine(self) -> list[dict[str, str]]:
        """What could not be read and was left out: name, reason, the error's class."""
        return read_quarantine(quarantine_of(self.path))

    def require_captions(self) -> list[str]:
        """The first caption of every image; a UserError where one is missing."""
        remedy = "Give each image one: conf/data/image_folder.yaml says where captions are looked for"
        return _all_present(self, "text", "captions", self.captions, remedy)

    def captions_of(self, index: int) -> list[str]:
        """Every caption of an image, the first one first."""
        first = self.captions[index] if self.captions is not None else None
        return [] if first is None else [first, *self.more_captions.get(int(index), [])]

    def require_labels(self) -> list[int]:
        """Every class label; a UserError where one is missing."""
        remedy = "Sort them into one folder per class, or name the column of a dataset that holds the labels"
        return _all_present(self, "class", "class labels", self.labels, remedy)


_KEPT = ("name", "licence", "names", "captions", "labels", "class_names", "fingerprint", "num_skipped")


def _check(index: dict[str, Any], images: np.ndarray, path: Path) -> None:
    kinds = {key: kind for key, kind in get_type_hints(ImageData).items() if key in _KEPT}
    kinds |= {"hashes": list[str], "captions": list[str | Annotated[list[str], Field(min_length=1)] | None] | None}
    check_fields(index, kinds, path / INDEX_FILE)
    check_fields(index, {"profiles": dict}, path / INDEX_FILE, required=False)
    lists = [index[key] for key in ("names", "hashes", "captions", "labels") if index[key] is not None]
    square = images.ndim == 4 and images.shape[1:] == (images.shape[1], images.shape[1], 3)
    if images.dtype != np.uint8 or not square or any(len(values) != len(images) for values in lists):
        found = f"{IMAGES_FILE} is {images.dtype} {images.shape}"
        raise UserError(f"{found}, and {INDEX_FILE} tells of {len(index['names'])} images")


def _all_present(data: ImageData, condition: str, what: str, values: list[Any] | None, remedy: str) -> list[Any]:
    values = values or [None] * len(data)
    if missing := [name for name, value in zip(data.names, values, strict=True) if value is None]:
        rule = f"needs {what} for every image, but {len(missing)} of {len(data)} images have no {what}"
        raise InputError("conditioning", condition, f"{rule}: {shorten(missing)}. {remedy}")
    return values


def verify_images(data: ImageData) -> Path:
    """Compare every byte of the prepared images with what was written; returns their folder.

    Raises:
        UserError: naming the images that changed.
    """
    if (found := damage(data.path, every_byte=True)) is not None:
        raise UserError(f"{data.path}: {found}. Delete that folder: the images are prepared again.")
    return data.path


def to_uint8(images: Tensor) -> Tensor:
    """The inverse of `ImageData.batch`: [-1, 1] -> uint8 of the same shape, rounded and clamped."""
    return ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def default_cache_dir() -> Path:
    """LDM_CACHE, or `ldm` in the platform's folder for caches."""
    if chosen := os.environ.get("LDM_CACHE"):
        return Path(chosen).expanduser()
    platform = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return (Path(platform) if platform else Path.home() / ".cache") / "ldm"


def split_by_hash(hashes: list[str], val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Train and validation indices, by the first 32 bits of an image's hash: none moves when others come.

    Copies of an image stay together. Neither side is ever empty: the image nearest to the border crosses it.
    """
    if len(set(hashes)) < 2:
        raise UserError("Training needs 2 different images at least: one to learn from, one to validate with.")
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
    val_fraction: BelowOne = 0.05,
    max_bad_fraction: BelowOne = 0.01,
    max_pixels: Count = MAX_PIXELS,
    progress: bool = True,
) -> ImageData:
    """Decode and resize every image of a source into the cache, or open what is there already.

    Every byte of a cache that is there is compared with its SHA-256, and a damaged one is made again.

    Args:
        max_bad_fraction: Share of unreadable images that are left out before it is an error.
        max_pixels: Images with more are left out, before they are decoded.

    Raises:
        UserError: too many unreadable images, too little disk space, fewer than 2 images, an unknown option.
    """
    transform = {"resolution": resolution, "resize": resize}
    made_from = {"format": FORMAT_VERSION, "identity": source.identity(), "transform": transform}
    if max_pixels != MAX_PIXELS:  # it may change what is left out; at its default the key is what it always was
        made_from["max_pixels"] = max_pixels
    key = sha256_of_values(made_from)[:12]
    folder = Path(cache_dir or default_cache_dir()).expanduser() / f"{source.name}-{key}"
    if damage(folder) is not None:
        fill_cache(
            folder, source, made_from, max_bad_fraction=max_bad_fraction, max_pixels=max_pixels, show_progress=progress
        )
    data = ImageData.open(folder, val_fraction)
    check_quarantine(data.num_skipped, len(data), max_bad_fraction, quarantine_of(folder))
    return data
