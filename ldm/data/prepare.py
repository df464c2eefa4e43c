"""Turn a source's records into a cache folder: decode in threads, keep the order, rename at the end.

What cannot be read is left out, once and for all, and listed in `quarantine.jsonl`: the order of training counts what
was prepared, so every batch is full, and what stands in a broken image's place depends on the set alone, not on
threads, workers, restarts or the step.
"""

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.cache import IMAGES_FILE, QUARANTINE_FILE, check_quarantine, damage, fingerprint, write_index
from ldm.data.colour import Profile, count_profiles
from ldm.data.pixels import Resize, read_pixels
from ldm.data.sources.base import Record, Source
from ldm.errors import InputError, UserError
from ldm.files.arrays import npy_header
from ldm.files.atomic import durable_folder
from ldm.files.lock import made_alone
from ldm.files.reading import FULL, is_failure
from ldm.progress import progress

MAX_DISK_FAILURES = 8
"""Files that a failing disk kept from being read, after every try: more, and it is the disk that needs repair."""


def fill_cache(
    folder: Path,
    source: Source,
    made_from: dict[str, Any],
    *,
    max_bad_fraction: float,
    max_pixels: int,
    show_progress: bool,
) -> None:
    """Write the cache folder of a source. It appears whole or not at all; a second process waits for the first.

    Raises:
        UserError: too many unreadable images, none at all, a disk that fails, or too little room on it.
    """
    transform = made_from["transform"]
    listing = folder / QUARANTINE_FILE
    with made_alone(folder):
        if (found := damage(folder)) is None:
            return
        if folder.exists():
            logging.getLogger(__name__).warning("%s: %s. The images are prepared again.", folder, found)
        if source.num_records is not None:
            needed, free = source.num_records * 3 * transform["resolution"] ** 2, shutil.disk_usage(folder.parent).free
            if needed > free:
                rule = f"has {free:,} bytes free, but the images need {needed:,}: free some, or lower the resolution"
                raise InputError("cache_dir", folder.parent, rule)
        try:
            with durable_folder(folder) as scratch, _quiet_pillow(max_pixels):
                index = _write_images(scratch, source, transform, max_pixels, show_progress)
                if index["num_skipped"]:
                    # Left beside the cache when the preparation fails, so that the whole list can be read.
                    complete = folder.with_name(f"{folder.name}.{QUARANTINE_FILE}")
                    shutil.copyfile(scratch / QUARANTINE_FILE, complete)
                    check_quarantine(index["num_skipped"], len(index["names"]), max_bad_fraction, complete)
                    complete.unlink()
                if not index["names"]:
                    raise UserError(f"{source.name} holds no images: {json.dumps(source.identity())}")
                index.update(made_from, name=source.name, licence=source.licence, class_names=source.class_names)
                index["fingerprint"] = fingerprint(index)
                write_index(scratch, index)
        except OSError as error:
            if error.errno in FULL:
                raise InputError("cache_dir", folder.parent, "filled up: free some space") from error
            raise
    if index["num_skipped"]:
        said = "%d unreadable images left out, see %s. To read them again, delete that folder."
        logging.getLogger(__name__).warning(said, index["num_skipped"], listing)


@contextmanager
def _quiet_pillow(max_pixels: int) -> Iterator[None]:
    """Remarks on metadata help nobody. Pillow's own limit, at twice our number, guards what is inside an image."""
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
    resolution = transform["resolution"]
    read = partial(_read, resolution=resolution, resize=transform["resize"], max_pixels=max_pixels)
    with (
        progress(transient=False, disable=not show_progress) as bar,
        (scratch / IMAGES_FILE).open("wb") as pixels_file,
        (scratch / QUARANTINE_FILE).open("w", encoding="utf-8") as quarantine,
    ):
        room = pixels_file.write(npy_header((0, resolution, resolution, 3), "uint8"))
        task = bar.add_task(f"Preparing {source.name} at {resolution} px", total=source.num_records)
        for record, result in _in_order(read, source.records()):
            bar.advance(task)
            if isinstance(result, Exception):
                num_skipped += 1
                num_failures += is_failure(result)
                if num_failures > MAX_DISK_FAILURES:
                    said = f"{num_failures} files could not be read, the last being {record.name} ({_reason(result)})"
                    raise UserError(f"The disk of {source.name} fails: {said}. Start again when it answers.")
                line = {"name": record.name, "reason": _reason(result), "error": type(result).__name__}
                quarantine.write(json.dumps(line) + "\n")
                continue
            digest, pixels, profile = result
            pixels_file.write(pixels.tobytes())
            names.append(record.name)
            hashes.append(digest)
            captions.append([record.caption, *record.more_captions] if record.more_captions else record.caption)
            labels.append(record.label)
            profiles.append(profile)
        pixels_file.seek(0)
        written = pixels_file.write(npy_header((len(names), resolution, resolution, 3), "uint8"))
        assert written == room, "the header grew over the first pixels"
    return {
        "names": names,
        "hashes": hashes,
        "captions": captions if any(caption is not None for caption in captions) else None,
        "labels": labels if any(label is not None for label in labels) else None,
        "num_skipped": num_skipped,
        "profiles": count_profiles(profiles),
    }


def _read(
    record: Record, resolution: int, resize: Resize, max_pixels: int
) -> tuple[str, np.ndarray, Profile] | Exception:
    """An image's hash, its pixels and what became of its colour profile, or why there are none."""
    try:
        loaded = record.load()
        return content_hash(record, loaded), *read_pixels(loaded, resolution, resize, max_pixels)
    except UserError:
        raise
    # On bad bytes Pillow's plugins raise anything, from struct.error to IndexError.
    except Exception as error:
        return error


def _reason(error: Exception) -> str:
    """One line of at most 300 characters."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(str(said).split())[:300] or type(error).__name__


def content_hash(record: Record, loaded: bytes | Image.Image) -> str:
    """SHA-256 of an image's own bytes: its file, or its pixels where it has none."""
    if record.content is not None:
        return hashlib.sha256(record.content).hexdigest()
    if isinstance(loaded, Image.Image):
        return hashlib.sha256(f"{loaded.mode} {loaded.size} ".encode() + loaded.tobytes()).hexdigest()
    return hashlib.sha256(loaded).hexdigest()


def _in_order(function: Callable[[Record], Any], records: Iterable[Record]) -> Iterator[tuple[Record, Any]]:
    """Map in threads, keeping the order and only a few images in memory."""
    num_workers, remaining = min(32, os.cpu_count() or 1), iter(records)
    with ThreadPoolExecutor(num_workers) as pool:
        while part := list(islice(remaining, 8 * num_workers)):
            yield from zip(part, pool.map(function, part), strict=True)
