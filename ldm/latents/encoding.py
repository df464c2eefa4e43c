"""Encode images to a file of posterior moments, in chunks, so that encoding can resume after an interruption.

Rows are appended in image order. Batch boundaries are fixed, because the rounding errors of a network depend on the
batch size. A chunk consists of complete batches, and a journal records the SHA-256 of each chunk. On resume, the chunks
are compared with the journal, and encoding continues after the last intact chunk. On the same machine and with the same
number of threads, the file is bitwise identical whether or not encoding was interrupted. A finished file is verified
against the journal when it is opened.
"""

import io
import json
import logging
import os
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.images import ImageData
from ldm.errors import UserError
from ldm.files.arrays import Layout, changed_rows, chunk_digests, mark_verified, npy_header
from ldm.files.atomic import write_text
from ldm.files.reading import MISSING_FILE, unreadable_error
from ldm.progress import progress

MOMENTS_FILE = "moments.npy"
JOURNAL_FILE = "chunks.json"
JOURNAL_FORMAT = 1
IMAGES_PER_CHUNK = 512

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


class NonFiniteLatentsError(UserError):
    """Raised if the encoder returns NaN or infinity. Retrying would not help."""


def encode_moments(
    folder: Path, encode: Encode, images: ImageData, shape: tuple[int, ...], dtype: str, batch_size: int
) -> None:
    """Write the moments file in `folder`, continuing after any intact chunks that an interrupted run left.

    Args:
        shape: (images, views, 2, C, h, w).

    Raises:
        NonFiniteLatentsError: A latent is not finite, because the autoencoder diverged during training.
    """
    header = npy_header(shape, dtype)
    row_bytes = int(np.prod(shape[1:])) * np.dtype(dtype).itemsize
    chunk_rows = batch_size * max(1, IMAGES_PER_CHUNK // batch_size)
    layout = Layout(len(header), row_bytes, shape[0], chunk_rows)
    chunks = layout.chunks()
    file_path = folder / MOMENTS_FILE
    digests = _intact_digests(folder, layout, batch_size)
    num_encoded = chunks[len(digests) - 1].stop if digests else 0
    if num_encoded:
        logging.getLogger(__name__).info("Resuming: %d of %d images are already encoded.", num_encoded, shape[0])

    # unbuffered, so that closing the file does not retry a write that failed on a full disk
    with file_path.open("r+b" if digests else "w+b", buffering=0) as file, progress() as bar:
        task = bar.add_task("encoding latents", total=shape[0], completed=num_encoded)
        if not digests:
            _append(file, header)
        file.truncate(layout.offset(num_encoded))
        file.seek(layout.offset(num_encoded))
        for rows in chunks[len(digests) :]:
            for start in range(rows.start, rows.stop, batch_size):
                indices = range(start, min(start + batch_size, rows.stop))
                _append(file, _encode_batch(encode, images, indices, shape, dtype))
                bar.advance(task, len(indices))
            digests += chunk_digests(file_path, layout, [rows])
            os.fsync(file.fileno())
            write_text(folder / JOURNAL_FILE, json.dumps(_journal(layout, batch_size) | {"sha256": digests}) + "\n")
    mark_verified(file_path, digests)


def check_moments(folder: Path, *, every_byte: bool = False) -> None:
    """Verify the moments file against its journal. Older caches have no journal and are accepted without verification.

    Args:
        every_byte: Verify all chunks even if the size and modification time of the file are unchanged.

    Raises:
        UserError: The file was modified (the message lists the affected images), or it cannot be read.
    """
    if not (folder / JOURNAL_FILE).is_file():
        logging.getLogger(__name__).info("%s has no digests, so its contents are not verified.", folder)
        return
    remedy = f"Delete {folder}. The latents will be encoded again."
    try:
        journal = _read_journal(folder)
        layout = Layout(*(journal[key] for key in ("header_bytes", "row_bytes", "num_rows", "chunk_rows")))
        bad_rows = changed_rows(folder / MOMENTS_FILE, layout, journal["sha256"], every_byte=every_byte)
    except (*MISSING_FILE, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / JOURNAL_FILE} does not match {MOMENTS_FILE} ({error}). {remedy}") from error
    except OSError as error:
        raise unreadable_error(folder, error) from error
    if bad_rows:
        ranges = ", ".join(f"{rows.start} to {rows.stop - 1}" for rows in bad_rows[:5]) + ", ..." * (len(bad_rows) > 5)
        raise UserError(f"{folder / MOMENTS_FILE} was modified after encoding. Affected images: {ranges}. {remedy}")


def _encode_batch(encode: Encode, images: ImageData, indices: range, shape: tuple[int, ...], dtype: str) -> memoryview:
    pixels = images.batch(indices)
    moments = np.empty((len(indices), *shape[1:]), dtype)
    for view in range(shape[1]):
        encoded = torch.stack(encode(pixels.flip(-1) if view else pixels), dim=1).float().cpu()
        if not encoded.isfinite().all():
            remedy = "The autoencoder diverged during training. Train it again with a lower learning rate."
            message = f"The latents of images {indices.start} to {indices.stop - 1} are not finite."
            raise NonFiniteLatentsError(f"{message} {remedy}")
        moments[:, view] = encoded.numpy()
    return moments.data.cast("B")


def _append(file: io.FileIO, data: bytes | memoryview) -> None:
    remaining = memoryview(data)
    while remaining:  # an unbuffered file can write fewer bytes than requested
        remaining = remaining[file.write(remaining) :]


def _read_journal(folder: Path) -> dict[str, Any]:
    journal = json.loads((folder / JOURNAL_FILE).read_text(encoding="utf-8"))
    if journal["format"] != JOURNAL_FORMAT:
        raise ValueError(f"format {journal['format']} instead of {JOURNAL_FORMAT}")
    return journal


def _journal(layout: Layout, batch_size: int) -> dict[str, Any]:
    return {"format": JOURNAL_FORMAT, "batch_size": batch_size, **vars(layout)}


def _intact_digests(folder: Path, layout: Layout, batch_size: int) -> list[str]:
    """Return the digests of all chunks before the first damaged one.

    The list is empty if the journal is missing or damaged, or was written with a different layout or batch size.

    Raises:
        UserError: The chunks cannot be read.
    """
    try:
        journal = _read_journal(folder)
        recorded = journal.pop("sha256")
        if journal != _journal(layout, batch_size):
            return []
        actual = chunk_digests(folder / MOMENTS_FILE, layout, layout.chunks()[: len(recorded)])
    except (*MISSING_FILE, ValueError, KeyError, TypeError, AttributeError):
        return []
    except OSError as error:
        raise unreadable_error(folder, error) from error
    return [digest for digest, _ in takewhile(lambda pair: pair[0] == pair[1], zip(actual, recorded, strict=False))]
