"""ldm.files.arrays: digests are verified once per machine, and only if the file could have changed."""

import os
import threading

import numpy as np
import pytest

from ldm.files import arrays
from ldm.files.arrays import Layout, changed_rows, chunk_digests, npy_header


@pytest.fixture
def array_file(tmp_path):
    """Write a file with 8 rows of 16 bytes and an old modification time. Return it with its layout and digests."""
    header, file = npy_header((8, 16), "uint8"), tmp_path / "array.npy"
    file.write_bytes(header + bytes(range(128)))
    os.utime(file, ns=(10**18, 10**18))
    layout = Layout(len(header), 16, 8, 2)
    return file, layout, chunk_digests(file, layout)


def test_concurrent_checks_read_a_file_once(array_file, monkeypatch):
    file, layout, expected = array_file
    reads = []

    def slow_digests(*arguments):
        reads.append(1)
        threading.Event().wait(0.2)
        return chunk_digests(*arguments)

    monkeypatch.setattr(arrays, "chunk_digests", slow_digests)
    threads = [threading.Thread(target=changed_rows, args=array_file) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1
    assert changed_rows(file, layout, expected) == [] and len(reads) == 1


def test_changed_byte_is_detected_by_modification_time_or_on_request(array_file):
    file, layout, expected = array_file
    assert changed_rows(*array_file) == []
    content = bytearray(file.read_bytes())
    content[layout.offset(5)] ^= 1
    file.write_bytes(content)
    assert changed_rows(file, layout, expected) == [range(4, 6)]
    os.utime(file, ns=(10**18, 10**18))
    assert changed_rows(file, layout, expected) == [], (
        "a changed byte with the old modification time, as after a bit flip on disk, should not be detected"
    )
    assert changed_rows(file, layout, expected, every_byte=True) == [range(4, 6)]


def test_only_large_files_are_marked_as_verified_right_after_writing(array_file, monkeypatch):
    file, layout, expected = array_file
    os.utime(file)
    assert changed_rows(*array_file) == [] and not arrays._is_verified(file, expected)
    monkeypatch.setattr(arrays, "LARGE_FILE_BYTES", 100)
    monkeypatch.setattr(arrays, "MTIME_RESOLUTION_NS", 10**8)
    assert changed_rows(*array_file) == [] and arrays._is_verified(file, expected)
    assert np.load(file).shape == (8, 16)
