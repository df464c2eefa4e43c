"""The cache of latents: killed, interrupted, out of room, raced for, damaged; whole and the same bytes, or refused."""

import dataclasses
import errno
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.latents import encoding as latent_encoding
from ldm.latents.cache import LatentData, open_latents
from ldm.latents.contract import LatentContract
from tests.latents.kill_encoding import encode

ROOT = Path(__file__).parents[2]
POSIX = pytest.mark.skipif(os.name == "nt", reason="POSIX only")


@pytest.fixture
def contract(contract) -> LatentContract:
    """Two views."""
    return dataclasses.replace(contract, flip=True)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    """Four chunks of eight images."""
    monkeypatch.setattr(latent_encoding, "CHUNK_IMAGES", 8)


class Encoder:
    """Counts its batches, and is interrupted before that of a number."""

    def __init__(self, stops_at: int | None = None, wait_s: float = 0):
        self.calls, self.stops_at, self.wait_s = 0, stops_at, wait_s

    def __call__(self, pixels):
        if self.calls == self.stops_at:
            raise KeyboardInterrupt
        self.calls += 1
        time.sleep(self.wait_s)
        return encode(pixels)


def opened(encode, contract, images, cache_dir, batch_size=4) -> LatentData:
    return open_latents(encode, contract, images, cache_dir=cache_dir, batch_size=batch_size)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(images, contract, tmp_path) -> dict[str, bytes]:
    """Every file of a cache that was encoded in one go."""
    return bytes_of(opened(Encoder(), contract, images, tmp_path / "whole").path)


@POSIX
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS aborts forked children that use its libraries")
def test_a_kill_at_any_point_ends_in_the_same_bytes():
    """SIGKILL before every file operation of an encoding, which is then done again."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a busy disk's fsync would take most of the time
    with tempfile.TemporaryDirectory(dir=memory) as place:
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests/latents/kill_encoding.py"), place],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    points, equal = map(int, done.stdout.split()[-2:])
    assert points == equal >= 50, done.stdout


@pytest.mark.parametrize("damage", ["a byte of chunk 1", "cut", "no journal", "journal", "other batches", "contract"])
def test_what_an_interruption_left_is_compared_before_it_is_used(images, contract, tmp_path, whole, damage):
    with pytest.raises(KeyboardInterrupt):
        opened(Encoder(12), contract, images, tmp_path / "cache")
    (unfinished,) = (tmp_path / "cache").glob(".latents-*.unfinished")
    moments, journal = unfinished / "moments.npy", unfinished / "chunks.json"
    expected, batch_size = 16, 4
    if damage == "a byte of chunk 1":
        content = bytearray(moments.read_bytes())
        content[128 + 8 * 192 + 5] ^= 1
        moments.write_bytes(content)
        expected = 12
    elif damage == "cut":
        os.truncate(moments, 128 + 17 * 192)
        expected = 8
    elif damage == "no journal":
        journal.unlink()
    elif damage == "journal":
        journal.write_text("{")
    elif damage == "other batches":
        batch_size = 8
        whole = bytes_of(opened(Encoder(), contract, images, tmp_path / "eights", 8).path)
        expected = 8
    else:
        (unfinished / "contract.json").write_text(json.dumps({"format": 1}))
    again = Encoder()
    assert bytes_of(opened(again, contract, images, tmp_path / "cache", batch_size).path) == whole
    assert again.calls == expected


@POSIX
def test_a_disk_that_fills_keeps_what_is_done(images, contract, tmp_path, whole):
    """The system refuses to write beyond the limit, in the middle of a batch."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128 + 20 * 192 + 7, limits[1]))
    try:
        with pytest.raises(UserError, match=r"filled up.* kept in .*unfinished.* continues"):
            opened(Encoder(), contract, images, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    again = Encoder()
    assert bytes_of(opened(again, contract, images, tmp_path / "cache").path) == whole
    assert again.calls == 8, "two of four chunks were kept"


def test_two_that_want_the_same_cache_encode_it_once(images, contract, tmp_path, whole, caplog):
    encoders, results = [Encoder(wait_s=0.02) for _ in range(3)], []
    threads = [
        threading.Thread(target=lambda one=one: results.append(opened(one, contract, images, tmp_path / "cache")))
        for one in encoders
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(encoder.calls for encoder in encoders) == [0, 0, 16]
    assert len(results) == 3 and bytes_of(results[0].path) == whole
    assert "Another process is creating" in caplog.text and "Waiting" in caplog.text


def test_every_changed_byte_is_refused_by_name(images, contract, tmp_path, whole):
    """All of the header and of the two small files, every fifth of the moments; what is no error has no effect."""
    folder = opened(Encoder(), contract, images, tmp_path).path
    expected, flipped, refused = opened(Encoder(0), contract, images, tmp_path).moments.tobytes(), 0, 0
    for name, content in whole.items():
        step = 5 if name == "moments.npy" else 1
        for position in (*range(min(128, len(content))), *range(128, len(content), step)):
            changed = bytearray(content)
            changed[position] ^= 1
            (folder / name).write_bytes(changed)
            flipped += 1
            try:
                latents = opened(Encoder(0), contract, images, tmp_path)
                assert name != "moments.npy" and latents.moments.tobytes() == expected, (name, position)
            except UserError as error:
                refused += 1
                assert str(folder) in str(error), (name, position)
                if (name, position) == ("moments.npy", 128 + 5 * 660):
                    assert re.search(r"moments\.npy changed .* images 16 to 23\. Delete .*encoded again", str(error))
        (folder / name).write_bytes(content)
    print(f"{refused} of {flipped} changed bytes refused, the rest without effect")
    assert flipped > 1800 and refused > 0.97 * flipped


@pytest.mark.parametrize("stopped", [False, True], ids=["finished", "interrupted"])
def test_a_disk_that_fails_while_a_cache_is_compared_is_no_damage(images, contract, tmp_path, monkeypatch, stopped):
    if stopped:
        with pytest.raises(KeyboardInterrupt):
            opened(Encoder(5), contract, images, tmp_path)
    else:
        opened(Encoder(), contract, images, tmp_path)

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("ldm.files.arrays._digest", fails)
        with pytest.raises(UserError, match=r"cannot be read \(Input/output error\).*not modified"):
            opened(Encoder(0), contract, images, tmp_path)
    encoder = Encoder()
    opened(encoder, contract, images, tmp_path)
    assert encoder.calls < 16, "what was encoded is there still"


@pytest.mark.parametrize("file", ["moments.npy", "contract.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer"])
def test_a_damaged_file_is_refused_with_the_remedy(images, contract, tmp_path, file, damage):
    path = opened(Encoder(), contract, images, tmp_path).path / file
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "longer": content + b"x"}[damage])
    with pytest.raises(UserError, match="(?i)delete|once its folder is deleted"):
        opened(Encoder(0), contract, images, tmp_path)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(LatentContract)])
def test_every_field_of_the_contract_is_compared(images, contract, tmp_path, field):
    """Another autoencoder, other data, another transform: each by its name."""
    file = opened(Encoder(), contract, images, tmp_path).path / "contract.json"
    content = json.loads(file.read_text())
    value = content[field]
    content[field] = (not value) if isinstance(value, bool) else value + (1 if not isinstance(value, str) else "x")
    file.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=rf"{field} is .* in this run but .*latents-|has {field} 2; this version reads 1"
    ):
        opened(Encoder(0), contract, images, tmp_path)


def test_a_cache_of_before_is_opened_and_that_is_said(images, contract, tmp_path, caplog):
    folder = opened(Encoder(), contract, images, tmp_path).path
    (folder / "chunks.json").unlink()
    with caplog.at_level(logging.INFO):
        assert isinstance(opened(Encoder(0), contract, images, tmp_path), LatentData)
    assert "keeps no digests" in caplog.text
