"""Preparation of images from a source: decode in threads, preserve their order, write the cache folder atomically.

Unreadable images are skipped during preparation and listed in `quarantine.jsonl`. Training only sees prepared images,
so every batch is full and its content does not depend on threads, workers or restarts.
"""

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.data.cache import (
    IMAGES_FILE,
    QUARANTINE_FILE,
    check_quarantine,
    find_cache_damage,
    fingerprint,
    write_index,
)
from ldm.data.classes import number_classes
from ldm.data.colour import count_profiles
from ldm.data.pixels import BadImageError, BitDepth, Decoded, Resize, read_pixels
from ldm.data.sources.base import Record, Source
from ldm.errors import InputError, UserError
from ldm.files.arrays import npy_header
from ldm.files.atomic import atomic_folder
from ldm.files.lock import cache_lock
from ldm.files.reading import DISK_FULL, is_disk_failure
from ldm.progress import progress

DARK_GREY = 4095
"""16-bit grey images whose values do not exceed this one are nearly black. Most of them have 12 bits."""
MAX_DISK_FAILURES = 8
"""Maximum number of files with disk errors. If there are more, preparation stops and reports the failing disk."""


def fill_cache(
    folder: Path,
    source: Source,
    spec: dict[str, Any],
    *,
    max_bad_fraction: float | None,
    max_pixels: int,
    show_progress: bool,
) -> None:
    """Write the cache folder of a source atomically, under a lock that makes concurrent processes wait.

    Raises:
        UserError: too many images are unreadable, there are no images, or the disk is failing or full.
    """
    transform = spec["transform"]
    listing = folder / QUARANTINE_FILE
    with cache_lock(folder):
        if (damage := find_cache_damage(folder)) is None:
            return
        if folder.exists():
            logging.getLogger(__name__).warning("%s: %s. The images will be prepared again.", folder, damage)
        if source.num_records is not None:
            needed, free = source.num_records * 3 * transform["resolution"] ** 2, shutil.disk_usage(folder.parent).free
            if needed > free:
                rule = f"has {free:,} bytes free, but the images need {needed:,}"
                raise InputError("cache_dir", folder.parent, f"{rule}. Free some disk space or lower the resolution")
        try:
            with atomic_folder(folder) as scratch, _quiet_pillow(max_pixels):
                index = _write_images(scratch, source, transform, max_pixels, show_progress)
                if index["num_skipped"]:
                    # If preparation fails, the full list remains next to the cache folder for the user to read.
                    full_list = folder.with_name(f"{folder.name}.{QUARANTINE_FILE}")
                    shutil.copyfile(scratch / QUARANTINE_FILE, full_list)
                    check_quarantine(index["num_skipped"], len(index["names"]), max_bad_fraction, full_list)
                    full_list.unlink()
                if not index["names"]:
                    raise UserError(f"{source.name} contains no images: {json.dumps(source.identity())}")
                index["labels"], index["class_names"] = number_classes(index["labels"], source.class_names)
                index.update(spec, name=source.name, licence=source.licence)
                index["accounting"] = {**index["accounting"], "notes": list(getattr(source, "notes", ()))}
                index["fingerprint"] = fingerprint(index)
                write_index(scratch, index)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise InputError("cache_dir", folder.parent, "is full. Free some disk space") from error
            raise
    if index["num_skipped"] and max_bad_fraction is not None:
        message = "Skipped %d unreadable images, listed in %s. To retry them, delete the folder containing that file."
        logging.getLogger(__name__).warning(message, index["num_skipped"], listing)


@contextmanager
def _quiet_pillow(max_pixels: int) -> Iterator[None]:
    """Silence Pillow's warnings about metadata and set its limit on the number of pixels.

    Pillow raises an error above twice this limit, including for images embedded in other images.
    """
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _write_images(
    scratch: Path, source: Source, transform: dict[str, Any], max_pixels: int, show_progress: bool
) -> dict[str, Any]:
    names, hashes, captions, labels, profiles, num_skipped, num_failures = [], [], [], [], [], 0, 0
    skipped, converted, deep = Counter(getattr(source, "skipped", ())), Counter[str](), []
    resolution = transform["resolution"]
    read = partial(
        _read,
        resolution=resolution,
        resize=transform["resize"],
        max_pixels=max_pixels,
        bit_depth=transform.get("bit_depth", 16),
    )
    with (
        progress(transient=False, disable=not show_progress) as bar,
        (scratch / IMAGES_FILE).open("wb") as pixels_file,
        (scratch / QUARANTINE_FILE).open("w", encoding="utf-8") as quarantine,
    ):
        header_bytes = pixels_file.write(npy_header((0, resolution, resolution, 3), "uint8"))
        task = bar.add_task(f"Preparing {source.name} at {resolution} px", total=source.num_records)
        for record, result in _in_order(read, source.records()):
            bar.advance(task)
            if isinstance(result, Exception):
                num_skipped += 1
                skipped[_kind(result)] += 1
                num_failures += is_disk_failure(result)
                if num_failures > MAX_DISK_FAILURES:
                    failures = f"{num_failures} files could not be read, including {record.name} ({_reason(result)})"
                    remedy = "Try again when the disk is available."
                    raise UserError(f"The disk that stores {source.name} is failing: {failures}. {remedy}")
                entry = {"name": record.name, "reason": _reason(result), "error": type(result).__name__}
                quarantine.write(json.dumps(entry) + "\n")
                continue
            digest, decoded = result
            pixels_file.write(decoded.pixels.tobytes())
            names.append(record.name)
            hashes.append(digest)
            captions.append([record.caption, *record.more_captions] if record.more_captions else record.caption)
            labels.append(record.label)
            profiles.append(decoded.profile)
            converted.update(filter(None, [decoded.mode, "transparent" if decoded.is_transparent else None]))
            deep += [] if decoded.max_grey is None else [decoded.max_grey]
        pixels_file.seek(0)
        num_written = pixels_file.write(npy_header((len(names), resolution, resolution, 3), "uint8"))
        assert num_written == header_bytes, "the header overwrote the first pixels"
    return {
        "names": names,
        "hashes": hashes,
        "captions": captions if any(caption is not None for caption in captions) else None,
        "labels": labels,
        "num_skipped": num_skipped,
        "profiles": count_profiles(profiles),
        "accounting": {
            "skipped": dict(+skipped),
            "converted": dict(converted),
            "dark_16_bit": sum(value <= DARK_GREY for value in deep),
            "max_16_bit": max(deep, default=None),
        },
    }


def _read(
    record: Record, resolution: int, resize: Resize, max_pixels: int, bit_depth: BitDepth
) -> tuple[str, Decoded] | Exception:
    """Return the hash of an image and the decoded image, or the exception raised while reading it."""
    try:
        loaded = record.load()
        return content_hash(record, loaded), read_pixels(loaded, resolution, resize, max_pixels, bit_depth)
    except UserError:
        raise
    # Pillow's plugins can raise anything on invalid data, from struct.error to IndexError.
    except Exception as error:
        return error


def _kind(error: Exception) -> str:
    """Return the kind of error, under which skipped images are counted."""
    if isinstance(error, BadImageError):
        return error.kind
    return (error.strerror or "cannot be read").lower() if isinstance(error, OSError) and error.errno else "damaged"


def _reason(error: Exception) -> str:
    """Describe an error in one line of at most 300 characters."""
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(str(message).split())[:300] or type(error).__name__


def content_hash(record: Record, loaded: bytes | Image.Image) -> str:
    """Return the SHA-256 of `record.content` if set, otherwise of the image file, or of the pixels without a file."""
    if record.content is not None:
        return hashlib.sha256(record.content).hexdigest()
    if isinstance(loaded, Image.Image):
        return hashlib.sha256(f"{loaded.mode} {loaded.size} ".encode() + loaded.tobytes()).hexdigest()
    return hashlib.sha256(loaded).hexdigest()


def _in_order(function: Callable[[Record], Any], records: Iterable[Record]) -> Iterator[tuple[Record, Any]]:
    """Map `function` over the records in threads, in order, with only a few images in memory at a time."""
    num_workers, remaining = min(32, os.cpu_count() or 1), iter(records)
    with ThreadPoolExecutor(num_workers) as pool:
        while group := list(islice(remaining, 8 * num_workers)):
            yield from zip(group, pool.map(function, group), strict=True)
