"""A cache folder of prepared images: what names it, what was left out of it, whether its bytes are still its own."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import InputError
from ldm.files.arrays import Layout, changed, digests, mark_verified
from ldm.files.digest import sha256_of_values
from ldm.files.reading import MISSING, unreadable

FORMAT_VERSION = 1
"""Of the cache folder. A folder that says another number is prepared again."""

IMAGES_FILE = "images.npy"
INDEX_FILE = "index.json"
QUARANTINE_FILE = "quarantine.jsonl"
CHUNK_BYTES = 2**23


def fingerprint(index: dict[str, Any]) -> str:
    """SHA-256 over everything that a model can learn from a prepared set, and the order it comes in.

    The hashes are of the images' files, their colour profiles included; whether any of those converted colours is told
    apart.
    """
    parts = {key: index[key] for key in ("hashes", "captions", "labels", "transform")}
    return sha256_of_values(parts | ({"colours": "sRGB"} if "converted" in index["profiles"] else {}))


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write index.json with the SHA-256 of the pixels, in chunks, and of itself."""
    file = folder / IMAGES_FILE
    index = index | {"pixels_sha256": digests(file, _layout(file))}
    mark_verified(file, index["pixels_sha256"])
    # ASCII: what a caption or a file's name holds can always be written
    text = json.dumps(index | {"sha256": _sha256_of(index)})
    (folder / INDEX_FILE).write_text(text, encoding="utf-8")


def damage(folder: Path, *, every_byte: bool = False) -> str | None:
    """Why the folder is no finished cache of this format with the bytes that were written; None where it is one.

    One from before digests were kept is taken as it is.

    Args:
        every_byte: Compare all pixels, also where file sizes and times say that nothing was written.

    Raises:
        UserError: its disk does not let it be read.
    """
    if not ((folder / INDEX_FILE).is_file() and (folder / IMAGES_FILE).is_file()):
        return "it is not whole"
    try:
        index, layout = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8")), _layout(folder / IMAGES_FILE)
        if index["format"] != FORMAT_VERSION or layout.num_rows != len(index["names"]):
            return "it is of another format"
        if not {"sha256", "pixels_sha256"} & set(index):
            return None
        bad = [] if index["sha256"] == _sha256_of(index) else [INDEX_FILE]
        rows = changed(folder / IMAGES_FILE, layout, index["pixels_sha256"], every_byte=every_byte)
        bad += [f"images {part.start} to {part.stop - 1} in {IMAGES_FILE}" for part in rows]
    except (*MISSING, EOFError, ValueError, KeyError, TypeError, AttributeError):
        return "it is not whole"
    except OSError as error:
        raise unreadable(folder, error) from error
    return f"{shorten(bad)} changed since the images were prepared" if bad else None


def check_quarantine(num_skipped: int, num_images: int, max_bad_fraction: float, listing: Path) -> None:
    """Raise a UserError that names the first unreadable images when there are too many of them."""
    total = num_skipped + num_images
    if num_skipped <= max_bad_fraction * total:
        return
    bad = [f"{entry['name']} ({entry['reason']})" for entry in read_quarantine(listing)[:6]]
    rule = f"must be at least {math.ceil(100 * num_skipped / total) / 100} to skip the {num_skipped} of {total} images"
    said = f"{rule} that cannot be read: {shorten(bad)}. All are listed in {listing}"
    raise InputError("max_bad_fraction", max_bad_fraction, said)


def quarantine_of(folder: Path) -> Path:
    """The list of what was left out of a cache folder."""
    listing, before = folder / QUARANTINE_FILE, folder / "skipped.jsonl"  # its name in older caches
    return before if before.is_file() and not listing.is_file() else listing


def read_quarantine(listing: Path) -> list[dict[str, str]]:
    """Name, reason and, but in older caches, the error's class of each image that was left out."""
    return [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]


def shorten(names: list[str], shown: int = 5) -> str:
    """The first few of a list, for an error message."""
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


def _layout(file: Path) -> Layout:
    images = np.load(file, mmap_mode="r")
    row_bytes = images[:1].nbytes
    return Layout(images.offset, row_bytes, len(images), max(1, CHUNK_BYTES // max(1, row_bytes)))


def _sha256_of(index: dict[str, Any]) -> str:
    rest = {key: value for key, value in index.items() if key != "sha256"}
    return sha256_of_values(rest)
