"""Turn a source's records into a cache folder: decode in threads, keep the order, rename at the end."""

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ldm.data.pixels import Resize, decode
from ldm.data.sources import Record, Source
from ldm.errors import UserError
from ldm.untrusted import read_array, read_json

FORMAT_VERSION = 1
"""Of the cache folder. A folder that says another number is prepared again."""


def fill_cache(
    folder: Path, source: Source, made_from: dict[str, Any], *, max_bad_fraction: float, progress: bool
) -> None:
    """Write the cache folder of a source. It appears whole or not at all; two processes may race.

    Raises:
        UserError: too many unreadable images, none at all, or too little disk space.
    """
    transform = made_from["transform"]
    bytes_per_image = 3 * transform["resolution"] ** 2
    folder.parent.mkdir(parents=True, exist_ok=True)
    if source.num_records is not None:
        _check_space(folder.parent, source.num_records * bytes_per_image)
    scratch = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    scratch.mkdir()
    try:
        index = _write_images(scratch, source, transform["resolution"], transform["resize"], progress)
        num_images = len(index["names"])
        if num_skipped := index["num_skipped"]:
            # Left beside the cache when the preparation fails, so that the whole list can be read.
            complete = folder.with_name(f"{folder.name}.skipped.jsonl")
            shutil.copyfile(scratch / "skipped.jsonl", complete)
            check_skipped(num_skipped, num_images, max_bad_fraction, complete)
            complete.unlink()
            listing = folder / "skipped.jsonl"
            logging.getLogger(__name__).warning("%d unreadable images skipped, see %s", num_skipped, listing)
        if num_images == 0:
            raise UserError(f"{source.name} holds no images: {json.dumps(source.identity())}")
        index.update(made_from, name=source.name, licence=source.licence, class_names=source.class_names)
        index["fingerprint"] = fingerprint(index["hashes"], index["captions"], index["labels"], transform)
        (scratch / "index.json").write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
        _move_into_place(scratch, folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"The disk of {folder.parent} filled up while the images were prepared. Free some space, or "
                "choose another disk with data.cache_dir=DIR."
            ) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def fingerprint(
    hashes: list[str],
    captions: list[str | None] | None,
    labels: list[int | None] | None,
    transform: dict[str, Any],
) -> str:
    """SHA-256 over everything that a model can learn from a prepared set, and the order it comes in."""
    parts = {"hashes": hashes, "captions": captions, "labels": labels, "transform": transform}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_skipped(num_skipped: int, num_images: int, max_bad_fraction: float, listing: Path) -> None:
    """Raise a UserError that names the first unreadable images when there are too many of them."""
    total = num_skipped + num_images
    if num_skipped <= max_bad_fraction * total:
        return
    lines = listing.read_text(encoding="utf-8").splitlines()
    bad = [f"{entry['name']} ({entry['reason']})" for entry in map(json.loads, lines[:6])]
    raise UserError(
        f"{num_skipped} of {total} images cannot be read, more than data.max_bad_fraction={max_bad_fraction} "
        f"allows: {shorten(bad)}. All are listed in {listing}. Repair or remove them, or accept the loss "
        f"with data.max_bad_fraction={math.ceil(100 * num_skipped / total) / 100}."
    )


def shorten(names: list[str], shown: int = 5) -> str:
    """The first few of a list, for an error message."""
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"Preparing the images needs {needed:,} bytes in {folder}, where {free:,} are free. Free some "
            "space, choose another disk with data.cache_dir=DIR, or lower data.resolution."
        )


def _write_images(scratch: Path, source: Source, resolution: int, resize: Resize, progress: bool) -> dict[str, Any]:
    names, hashes, captions, labels, num_skipped = [], [], [], [], 0

    def read(record: Record) -> tuple[str, np.ndarray] | Exception:
        try:
            loaded = record.load()
            return content_hash(record, loaded), decode(loaded, resolution, resize)
        except (UserError, MemoryError):
            raise
        # On bad bytes Pillow's plugins raise anything, from struct.error to IndexError.
        except Exception as error:
            return error

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not progress,
    )
    with (
        warnings.catch_warnings(),
        bar,
        (scratch / "images.npy").open("wb") as pixels_file,
        (scratch / "skipped.jsonl").open("w", encoding="utf-8") as skipped_file,
    ):
        # Remarks on one file's metadata help nobody; what passes Pillow's pixel limit is not to be decoded.
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        header_bytes = _write_header(pixels_file, 0, resolution)
        task = bar.add_task(f"Preparing {source.name} at {resolution} px", total=source.num_records)
        for record, result in _in_order(read, source.records()):
            bar.advance(task)
            if isinstance(result, Exception):
                num_skipped += 1
                reason = str(result) or type(result).__name__
                skipped_file.write(json.dumps({"name": record.name, "reason": reason}) + "\n")
                continue
            digest, pixels = result
            pixels_file.write(pixels.tobytes())
            names.append(record.name)
            hashes.append(digest)
            captions.append(record.caption)
            labels.append(record.label)
        pixels_file.seek(0)
        final_bytes = _write_header(pixels_file, len(names), resolution)
        assert final_bytes == header_bytes, "the header grew over the first pixels"
    return {
        "names": names,
        "hashes": hashes,
        "captions": captions if any(caption is not None for caption in captions) else None,
        "labels": labels if any(label is not None for label in labels) else None,
        "num_skipped": num_skipped,
    }


def _write_header(file: IO[bytes], num_images: int, resolution: int) -> int:
    """The header of the .npy format, which leaves room for the first axis to grow to any length."""
    shape = (num_images, resolution, resolution, 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def content_hash(record: Record, loaded: bytes | Image.Image) -> str:
    """SHA-256 of an image's own bytes: its file, or its pixels where it has none."""
    if record.content is not None:
        return hashlib.sha256(record.content).hexdigest()
    if isinstance(loaded, Image.Image):
        return hashlib.sha256(f"{loaded.mode} {loaded.size} ".encode() + loaded.tobytes()).hexdigest()
    return hashlib.sha256(loaded).hexdigest()


def _in_order(function: Callable[[Record], Any], records: Iterable[Record]) -> Iterator[tuple[Record, Any]]:
    """Map in threads, keeping the order and only a few images in memory."""
    num_workers = min(32, os.cpu_count() or 1)
    pending: deque[tuple[Record, Future[Any]]] = deque()
    with ThreadPoolExecutor(num_workers) as pool:
        try:
            for record in records:
                pending.append((record, pool.submit(function, record)))
                if len(pending) >= 4 * num_workers:
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _move_into_place(scratch: Path, folder: Path) -> None:
    """Rename. A finished folder in the way is another process's equal work and wins; a broken one yields."""
    try:
        scratch.replace(folder)
    except OSError:
        if not folder.is_dir():
            raise
        if is_current(folder):
            return
        shutil.rmtree(folder, ignore_errors=True)
        scratch.replace(folder)


def is_current(folder: Path) -> bool:
    """Whether the folder holds a finished, undamaged cache of this format."""
    try:
        index, images = read_json(folder / "index.json"), read_array(folder / "images.npy")
        return index["format"] == FORMAT_VERSION and len(images) == len(index["names"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
