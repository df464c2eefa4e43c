"""Images -> a file of moments, in chunks that an interruption does not take back.

Rows are appended in the order of the images, always in the same batches, for networks round differently in batches of
another size. Every chunk of whole batches gets a SHA-256 in a journal; whoever comes next compares the chunks with it,
goes on after the last good one, and ends with the bytes of an encoding that was never interrupted (on the same machine
with the same number of threads). The journal of a finished file is what it is compared with whenever it is opened.
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
CHUNK_IMAGES = 512

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


class NotFinite(UserError):
    """Latents that no later attempt will make finite."""


def encode_moments(
    folder: Path, encode: Encode, images: ImageData, shape: tuple[int, ...], dtype: str, batch_size: int
) -> None:
    """Write the moments file of a folder, going on where an earlier call was interrupted.

    Args:
        shape: (images, views, 2, C, h, w)

    Raises:
        NotFinite: the autoencoder diverged.
    """
    header = npy_header(shape, dtype)
    row_bytes = int(np.prod(shape[1:])) * np.dtype(dtype).itemsize
    chunk_rows = batch_size * max(1, CHUNK_IMAGES // batch_size)
    layout = Layout(len(header), row_bytes, shape[0], chunk_rows)
    chunks = layout.chunks()
    file_path = folder / MOMENTS_FILE
    kept = _kept(folder, layout, batch_size)
    done = chunks[len(kept) - 1].stop if kept else 0
    if done:
        logging.getLogger(__name__).info("%d of %d images were encoded before: going on there.", done, shape[0])

    # unbuffered: what a full disk refused is not tried again when the file is closed
    with file_path.open("r+b" if kept else "w+b", buffering=0) as file, progress() as bar:
        task = bar.add_task("encoding latents", total=shape[0], completed=done)
        if not kept:
            _append(file, header)
        file.truncate(layout.offset(done))
        file.seek(layout.offset(done))
        for rows in chunks[len(kept) :]:
            for start in range(rows.start, rows.stop, batch_size):
                indices = range(start, min(start + batch_size, rows.stop))
                _append(file, _moments(encode, images, indices, shape, dtype))
                bar.advance(task, len(indices))
            kept += chunk_digests(file_path, layout, [rows])
            os.fsync(file.fileno())
            write_text(folder / JOURNAL_FILE, json.dumps(_journal(layout, batch_size) | {"sha256": kept}) + "\n")
    mark_verified(file_path, kept)


def check_moments(folder: Path, *, every_byte: bool = False) -> None:
    """Compare a moments file with the journal beside it. A folder of an earlier version has none and passes.

    Args:
        every_byte: Compare all of it, also where its size and time say that nothing was written.

    Raises:
        UserError: naming the images whose latents changed; or its disk does not let it be read.
    """
    if not (folder / JOURNAL_FILE).is_file():
        logging.getLogger(__name__).info("%s keeps no digests: its bytes are not compared.", folder)
        return
    remedy = f"Delete {folder}; the latents will be encoded again."
    try:
        journal = _read_journal(folder)
        layout = Layout(*(journal[key] for key in ("header_bytes", "row_bytes", "num_rows", "chunk_rows")))
        bad = changed_rows(folder / MOMENTS_FILE, layout, journal["sha256"], every_byte=every_byte)
    except (*MISSING_FILE, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / JOURNAL_FILE} does not fit {MOMENTS_FILE} ({error}). {remedy}") from error
    except OSError as error:
        raise unreadable_error(folder, error) from error
    if bad:
        parts = ", ".join(f"{rows.start} to {rows.stop - 1}" for rows in bad[:5]) + ", ..." * (len(bad) > 5)
        raise UserError(f"{folder / MOMENTS_FILE} changed since it was encoded: images {parts}. {remedy}")


def _moments(encode: Encode, images: ImageData, indices: range, shape: tuple[int, ...], dtype: str) -> memoryview:
    pixels = images.batch(indices)
    moments = np.empty((len(indices), *shape[1:]), dtype)
    for view in range(shape[1]):
        encoded = torch.stack(encode(pixels.flip(-1) if view else pixels), dim=1).float().cpu()
        if not encoded.isfinite().all():
            remedy = "its training diverged. Train it again with a lower learning rate."
            raise NotFinite(f"The latents of images {indices.start} to {indices.stop - 1} are not finite: {remedy}")
        moments[:, view] = encoded.numpy()
    return moments.data.cast("B")


def _append(file: io.FileIO, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:  # a file may take less than it is given
        rest = rest[file.write(rest) :]


def _read_journal(folder: Path) -> dict[str, Any]:
    journal = json.loads((folder / JOURNAL_FILE).read_text(encoding="utf-8"))
    if journal["format"] != JOURNAL_FORMAT:
        raise ValueError(f"format {journal['format']} instead of {JOURNAL_FORMAT}")
    return journal


def _journal(layout: Layout, batch_size: int) -> dict[str, Any]:
    return {"format": JOURNAL_FORMAT, "batch_size": batch_size, **vars(layout)}


def _kept(folder: Path, layout: Layout, batch_size: int) -> list[str]:
    """The digests of the chunks that are done: none where the journal is of other batches, or is not whole.

    Raises:
        UserError: the disk does not let them be read.
    """
    try:
        journal = _read_journal(folder)
        known = journal.pop("sha256")
        if journal != _journal(layout, batch_size):
            return []
        found = chunk_digests(folder / MOMENTS_FILE, layout, layout.chunks()[: len(known)])
    except (*MISSING_FILE, ValueError, KeyError, TypeError, AttributeError):
        return []
    except OSError as error:
        raise unreadable_error(folder, error) from error
    return [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(found, known, strict=False))]
