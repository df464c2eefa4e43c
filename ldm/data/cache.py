"""Cache folders of prepared images: fingerprint, list of skipped images, and integrity checks."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import InputError, UserError
from ldm.files.arrays import Layout, changed_rows, chunk_digests, mark_verified
from ldm.files.digest import sha256_of_values
from ldm.files.reading import MISSING_FILE, unreadable_error

FORMAT_VERSION = 1
"""Version of the cache format. Caches with a different version are prepared again."""

IMAGES_FILE = "images.npy"
INDEX_FILE = "index.json"
QUARANTINE_FILE = "quarantine.jsonl"
CHUNK_BYTES = 2**23


def fingerprint(index: dict[str, Any], keys: Sequence[str] = ("hashes", "captions", "labels", "transform")) -> str:
    """Return the SHA-256 digest of everything that a model can learn from a prepared dataset, including its order.

    The image hashes cover the original files, including their colour profiles. Converting a profile to sRGB changes the
    fingerprint, because older caches contain the same files without colour conversion.
    """
    content = {key: index[key] for key in keys}
    return sha256_of_values(content | ({"colours": "sRGB"} if "converted" in index.get("profiles", {}) else {}))


def images_fingerprint(index: dict[str, Any]) -> str:
    """Return a SHA-256 digest of the images without captions and labels, which can be corrected later."""
    return fingerprint(index, ("hashes", "transform"))


def describe_change(before: Path, after: Path) -> str | None:
    """Describe how the data changed between two caches, in one clause. Return None if one of them cannot be read."""
    try:
        old, new = (json.loads((folder / INDEX_FILE).read_text(encoding="utf-8")) for folder in (before, after))
        names = dict(zip(old["hashes"] + new["hashes"], old["names"] + new["names"], strict=True))
        changes = []
        for verb, difference in (
            ("added", Counter(new["hashes"]) - Counter(old["hashes"])),
            ("removed or changed", Counter(old["hashes"]) - Counter(new["hashes"])),
        ):
            if number := difference.total():
                was = "was" if number == 1 else "were"
                changed = shorten([names[digest] for digest in difference])
                changes.append(f"{count(number, 'image')} {was} {verb} ({changed})")
        if not changes and old["names"] != new["names"]:
            changes.append("images were renamed")
        for kind in ("captions", "labels"):
            values = [index[kind] or [None] * len(index["names"]) for index in (old, new)]
            if not changes and (number := sum(first != second for first, second in zip(*values, strict=True))):
                changes.append(f"the {kind} of {count(number, 'image')} changed")
        if old["transform"] != new["transform"]:
            changes.append(f"the preparation changed from {old['transform']} to {new['transform']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return " and ".join(changes) or None


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write index.json with SHA-256 digests of the pixel chunks and of the index itself."""
    file = folder / IMAGES_FILE
    index = index | {"pixels_sha256": chunk_digests(file, _layout(file))}
    mark_verified(file, index["pixels_sha256"])
    # json.dumps escapes to ASCII, so any caption or file name can be written
    text = json.dumps(index | {"sha256": _sha256_of(index)})
    (folder / INDEX_FILE).write_text(text, encoding="utf-8")


def find_cache_damage(folder: Path, *, every_byte: bool = False) -> str | None:
    """Return the reason why a folder is not an intact cache in the current format, or None if it is intact.

    Caches written before digests existed are accepted unchecked.

    Args:
        every_byte: Verify all pixels, even if file sizes and modification times are unchanged.

    Raises:
        UserError: the folder cannot be read because of a disk failure.
    """
    if not ((folder / INDEX_FILE).is_file() and (folder / IMAGES_FILE).is_file()):
        return "the cache is incomplete"
    try:
        index, layout = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8")), _layout(folder / IMAGES_FILE)
        if index["format"] != FORMAT_VERSION or layout.num_rows != len(index["names"]):
            return "the cache has a different format"
        if not {"sha256", "pixels_sha256"} & set(index):
            return None
        damaged = [] if index["sha256"] == _sha256_of(index) else [INDEX_FILE]
        chunks = changed_rows(folder / IMAGES_FILE, layout, index["pixels_sha256"], every_byte=every_byte)
        damaged += [f"images {rows.start} to {rows.stop - 1} in {IMAGES_FILE}" for rows in chunks]
    except (*MISSING_FILE, EOFError, ValueError, KeyError, TypeError, AttributeError):
        return "the cache is incomplete"
    except OSError as error:
        raise unreadable_error(folder, error) from error
    return f"{shorten(damaged)} changed since the images were prepared" if damaged else None


def check_quarantine(num_skipped: int, num_images: int, max_bad_fraction: float | None, listing: Path) -> None:
    """Raise a UserError that names the first few unreadable images if there are too many."""
    total = num_skipped + num_images
    if not num_skipped or (num_images and (max_bad_fraction is None or num_skipped <= max_bad_fraction * total)):
        return
    unreadable = shorten([f"{entry['name']} ({entry['reason']})" for entry in read_quarantine(listing)[:6]])
    if not num_images:
        raise UserError(
            f"No image can be read ({count(total, 'image')} in total): {unreadable}. The full list is in {listing}."
        )
    digits = 2 if num_skipped <= 0.99 * total else 6  # the limit must be below 1
    limit = math.ceil(10**digits * num_skipped / total) / 10**digits
    rule = f"must be at least {limit} to skip the {num_skipped} of {total} images that cannot be read: {unreadable}"
    raise InputError("max_bad_fraction", max_bad_fraction, f"{rule}. The full list is in {listing}")


def quarantine_file(folder: Path) -> Path:
    """Return the file that lists the images skipped during preparation."""
    listing, legacy = folder / QUARANTINE_FILE, folder / "skipped.jsonl"  # file name in older caches
    return legacy if legacy.is_file() and not listing.is_file() else listing


def read_quarantine(listing: Path) -> list[dict[str, str]]:
    """Return the name, reason and error class of each skipped image. Older caches lack the error class."""
    return [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]


def shorten(names: list[str], limit: int = 5) -> str:
    """Join the first few names of a list, for messages."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def count(number: int, noun: str) -> str:
    """Return a number and its noun, such as "1 image" or "2,000 images"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _layout(file: Path) -> Layout:
    images = np.load(file, mmap_mode="r")
    row_bytes = images[:1].nbytes
    return Layout(images.offset, row_bytes, len(images), max(1, CHUNK_BYTES // max(1, row_bytes)))


def _sha256_of(index: dict[str, Any]) -> str:
    content = {key: value for key, value in index.items() if key != "sha256"}
    return sha256_of_values(content)
