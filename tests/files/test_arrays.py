"""An array's bytes are compared with its digests: once per machine, and only where they may have changed."""

import os
import threading

import numpy as np
import pytest

from ldm.files import arrays
from ldm.files.arrays import Layout, changed, digests, npy_header


@pytest.fixture
def stored(tmp_path):
    """A file of 8 rows of 16 bytes, written an hour ago; its layout and digests."""
    header, file = npy_header((8, 16), "uint8"), tmp_path / "array.npy"
    file.write_bytes(header + bytes(range(128)))
    os.utime(file, ns=(10**18, 10**18))
    layout = Layout(len(header), 16, 8, 2)
    return file, layout, digests(file, layout)


def test_processes_that_open_a_file_together_read_it_once(stored, monkeypatch):
    file, layout, known = stored
    read = []

    def slow(*arguments):
        read.append(1)
        threading.Event().wait(0.2)
        return digests(*arguments)

    monkeypatch.setattr(arrays, "digests", slow)
    openings = [threading.Thread(target=changed, args=stored) for _ in range(4)]
    for opening in openings:
        opening.start()
    for opening in openings:
        opening.join()
    assert len(read) == 1
    assert changed(file, layout, known) == [] and len(read) == 1


def test_a_changed_byte_is_found_by_its_time_or_on_request(stored):
    file, layout, known = stored
    assert changed(*stored) == []
    content = bytearray(file.read_bytes())
    content[layout.end(5)] ^= 1
    file.write_bytes(content)
    assert changed(file, layout, known) == [range(4, 6)]
    os.utime(file, ns=(10**18, 10**18))
    assert changed(file, layout, known) == [], "as a disk does that flips a bit"
    assert changed(file, layout, known, every_byte=True) == [range(4, 6)]


def test_a_large_file_is_noted_when_it_was_just_written(stored, monkeypatch):
    file, layout, known = stored
    os.utime(file)
    assert changed(*stored) == [] and not arrays._is_verified(file, known)
    monkeypatch.setattr(arrays, "LARGE_BYTES", 100)
    monkeypatch.setattr(arrays, "COARSE_NS", 10**8)
    assert changed(*stored) == [] and arrays._is_verified(file, known)
    assert np.load(file).shape == (8, 16)
