"""Arrays in .npy files, memory-mapped, whose bytes are known: SHA-256 by chunks of rows.

A training that runs still reads a file as it was that is deleted or replaced meanwhile, for the mapping holds it. It
sees bytes that are overwritten in place: they are compared when a cache is opened whose file has another modification
time than at the last comparison, and on request.
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
from ldm.files.lock import FOR_EVER, alone

COARSE_NS = 2_000_000_000
"""The coarsest modification time that a file system keeps, that of FAT."""
LARGE_BYTES = 2**30


@dataclass(frozen=True)
class Layout:
    """Where the rows of an array are in its file, and which of them share a digest."""

    header_bytes: int
    row_bytes: int
    num_rows: int
    chunk_rows: int

    @property
    def num_bytes(self) -> int:
        return self.end(self.num_rows)

    def end(self, row: int) -> int:
        """Where the row before this one ends."""
        return self.header_bytes + row * self.row_bytes

    def chunks(self) -> list[range]:
        """The rows of every chunk."""
        starts = range(0, self.num_rows, self.chunk_rows)
        return [range(start, min(start + self.chunk_rows, self.num_rows)) for start in starts]


def npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    """The header of the .npy format, which leaves room for the first axis to grow to any length."""
    buffer = io.BytesIO()
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def digests(path: Path, layout: Layout, chunks: Sequence[range] | None = None) -> list[str]:
    """SHA-256 of these chunks, all by default, in threads; the first includes the header."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(partial(_digest, path, layout), layout.chunks() if chunks is None else chunks))


def _digest(path: Path, layout: Layout, rows: range) -> str:
    start = layout.end(rows.start) if rows.start else 0
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(layout.end(rows.stop) - start)).hexdigest()


def changed(path: Path, layout: Layout, known: Sequence[str], *, every_byte: bool = False) -> list[range]:
    """The rows of the chunks that are not what they were; all, where the file's length is another.

    A file that has the size and the modification time of its last comparison is not read again. The processes of a
    machine compare one after the other, so that the first of them does it for all.

    Args:
        every_byte: Read it all the same.

    Raises:
        OSError: the file cannot be read.
    """
    chunks = layout.chunks()
    if len(known) != len(chunks) or path.stat().st_size != layout.num_bytes:
        return [range(layout.num_rows)]
    with ExitStack() as stack:
        if not _is_verified(path, known):
            with suppress(OSError):  # a disk that can only be read takes no lock
                stack.enter_context(alone(path.with_name(f".{path.name}.lock"), lambda: FOR_EVER))
        if _is_verified(path, known) and not every_byte:
            return []
        found = digests(path, layout, chunks)
        bad = [rows for rows, one, other in zip(chunks, found, known, strict=True) if one != other]
        if not bad:
            mark_verified(path, known)
    return bad


def mark_verified(path: Path, known: Sequence[str]) -> None:
    """Note that the file's bytes are those of these digests, as long as its size and modification time stay.

    File systems count time so coarsely that a second write may not show: of a file that was written a moment ago, a
    small one is not marked, and one that would take long to compare only when that moment is over.
    """
    age, size = time.time_ns() - path.stat().st_mtime_ns, path.stat().st_size
    if age < COARSE_NS:
        if size < LARGE_BYTES:
            return
        time.sleep((COARSE_NS - age) / 1e9)
    with suppress(OSError):
        write_text(_note(path), json.dumps(_state(path, known)) + "\n")


def _is_verified(path: Path, known: Sequence[str]) -> bool:
    try:
        return bool(json.loads(_note(path).read_text(encoding="utf-8")) == _state(path, known))
    except (OSError, ValueError):
        return False


def _note(path: Path) -> Path:
    return path.with_name(f".{path.name}.verified.json")


def _state(path: Path, known: Sequence[str]) -> dict[str, Any]:
    stat, digest = path.stat(), hashlib.sha256("".join(known).encode())
    return {"bytes": stat.st_size, "modified_ns": stat.st_mtime_ns, "sha256": digest.hexdigest()}
