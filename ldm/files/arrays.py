"""Integrity checks of memory-mapped .npy files, with one SHA-256 digest per chunk of rows.

A memory mapping keeps the contents of a file that is deleted or replaced during training, but changes if the file is
overwritten in place. Opening a cache therefore verifies the digests again if the modification time has changed since
the last verification, or on request.
"""

import hashlib
import io
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ldm.files.atomic import write_text
from ldm.files.lock import FOREVER, file_lock

MTIME_RESOLUTION_NS = 2_000_000_000
"""Resolution of modification times on FAT, the file system with the coarsest timestamps."""
LARGE_FILE_BYTES = 2**30
"""Files of at least this size are marked as verified right after writing, which requires a short wait."""


@dataclass(frozen=True)
class Layout:
    """Byte layout of an array's rows in its file, and their grouping into chunks with one digest each."""

    header_bytes: int
    row_bytes: int
    num_rows: int
    chunk_rows: int

    @property
    def num_bytes(self) -> int:
        return self.offset(self.num_rows)

    def offset(self, row: int) -> int:
        """Return the byte offset at which a row starts."""
        return self.header_bytes + row * self.row_bytes

    def chunks(self) -> list[range]:
        """Return the row range of each chunk."""
        starts = range(0, self.num_rows, self.chunk_rows)
        return [range(start, min(start + self.chunk_rows, self.num_rows)) for start in starts]


def npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    """Return a .npy header, padded so that its length does not depend on the size of the first axis."""
    buffer = io.BytesIO()
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def chunk_digests(path: Path, layout: Layout, chunks: Sequence[range] | None = None) -> list[str]:
    """Return the SHA-256 digest of each chunk (default: all chunks). The first chunk includes the header.

    The digests are computed in parallel threads.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(partial(_digest, path, layout), layout.chunks() if chunks is None else chunks))


def _digest(path: Path, layout: Layout, rows: range) -> str:
    start = layout.offset(rows.start) if rows.start else 0
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(layout.offset(rows.stop) - start)).hexdigest()


def changed_rows(path: Path, layout: Layout, expected: Sequence[str], *, every_byte: bool = False) -> list[range]:
    """Return the row ranges of all chunks whose digest has changed, or all rows if the file size has changed.

    A verified file is not read again until its size or modification time changes. Processes on the same machine take
    turns, so only the first one reads the file.

    Args:
        every_byte: Read the file even if the size and modification time are unchanged.

    Raises:
        OSError: The file cannot be read.
    """
    chunks = layout.chunks()
    if len(expected) != len(chunks) or path.stat().st_size != layout.num_bytes:
        return [range(layout.num_rows)]
    with ExitStack() as stack:
        if not _is_verified(path, expected):
            with suppress(OSError):  # no lock file can be created on a read-only disk
                stack.enter_context(file_lock(path.with_name(f".{path.name}.lock"), lambda: FOREVER))
        if _is_verified(path, expected) and not every_byte:
            return []
        actual = chunk_digests(path, layout, chunks)
        changed = [rows for rows, a, b in zip(chunks, actual, expected, strict=True) if a != b]
        if not changed:
            mark_verified(path, expected)
    return changed


def mark_verified(path: Path, digests: Sequence[str]) -> None:
    """Record that the file matches these digests, valid until its size or modification time changes.

    Modification times are coarse, so a second write shortly after the first can leave the time unchanged. A small file
    that has just been written is therefore not marked. For a large file, which takes long to verify, this function
    waits until the modification time is unambiguous.
    """
    age, size = time.time_ns() - path.stat().st_mtime_ns, path.stat().st_size
    if age < MTIME_RESOLUTION_NS:
        if size < LARGE_FILE_BYTES:
            return
        time.sleep((MTIME_RESOLUTION_NS - age) / 1e9)
    with suppress(OSError):
        write_text(_record_file(path), json.dumps(_verified_state(path, digests)) + "\n")


def _is_verified(path: Path, digests: Sequence[str]) -> bool:
    try:
        return bool(json.loads(_record_file(path).read_text(encoding="utf-8")) == _verified_state(path, digests))
    except (OSError, ValueError):
        return False


def _record_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.verified.json")


def _verified_state(path: Path, digests: Sequence[str]) -> dict[str, Any]:
    stat, digest = path.stat(), hashlib.sha256("".join(digests).encode())
    return {"bytes": stat.st_size, "modified_ns": stat.st_mtime_ns, "sha256": digest.hexdigest()}
