"""Fault tests of the latent cache: kills, interruptions, a full disk, concurrent processes and damaged files.

Each fault must result in a bitwise identical cache or in an error.
"""

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
    """Contract with two views."""
    return dataclasses.replace(contract, flip=True)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    """Use chunks of 8 images, so that 30 images need four chunks."""
    monkeypatch.setattr(latent_encoding, "IMAGES_PER_CHUNK", 8)


class Encoder:
    """Encoder that counts its batches and raises KeyboardInterrupt before batch `stops_at`."""

    def __init__(self, stops_at: int | None = None, wait_s: float = 0):
        self.calls, self.stops_at, self.wait_s = 0, stops_at, wait_s

    def __call__(self, pixels):
        if self.calls == self.stops_at:
            raise KeyboardInterrupt
        self.calls += 1
        time.sleep(self.wait_s)
        return encode(pixels)


def open_cache(encode, contract, images, cache_dir, batch_size=4) -> LatentData:
    return open_latents(encode, contract, images, cache_dir=cache_dir, batch_size=batch_size)


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def expected_files(images, contract, tmp_path) -> dict[str, bytes]:
    """Files of a cache whose encoding was not interrupted."""
    return read_files(open_cache(Encoder(), contract, images, tmp_path / "uninterrupted").path)


@POSIX
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS aborts forked children that use its libraries")
def test_encoding_killed_at_any_point_resumes_to_identical_bytes():
    """Send SIGKILL before each file operation, then resume encoding."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # fsync on a busy disk would dominate the run time
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        result = subprocess.run(
            [sys.executable, str(ROOT / "tests/latents/kill_encoding.py"), folder],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stderr
    num_points, num_identical = map(int, result.stdout.split()[-2:])
    assert num_points == num_identical >= 50, result.stdout


@pytest.mark.parametrize("damage", ["byte of chunk 1", "truncated", "no journal", "journal", "batch size", "contract"])
def test_resume_verifies_the_unfinished_cache(images, contract, tmp_path, expected_files, damage):
    with pytest.raises(KeyboardInterrupt):
        open_cache(Encoder(12), contract, images, tmp_path / "cache")
    (unfinished,) = (tmp_path / "cache").glob(".latents-*.unfinished")
    moments, journal = unfinished / "moments.npy", unfinished / "chunks.json"
    expected_calls, batch_size = 16, 4
    if damage == "byte of chunk 1":
        content = bytearray(moments.read_bytes())
        content[128 + 8 * 192 + 5] ^= 1
        moments.write_bytes(content)
        expected_calls = 12
    elif damage == "truncated":
        os.truncate(moments, 128 + 17 * 192)
        expected_calls = 8
    elif damage == "no journal":
        journal.unlink()
    elif damage == "journal":
        journal.write_text("{")
    elif damage == "batch size":
        batch_size = 8
        expected_files = read_files(open_cache(Encoder(), contract, images, tmp_path / "eights", 8).path)
        expected_calls = 8
    else:
        (unfinished / "contract.json").write_text(json.dumps({"format": 1}))
    encoder = Encoder()
    assert read_files(open_cache(encoder, contract, images, tmp_path / "cache", batch_size).path) == expected_files
    assert encoder.calls == expected_calls


@POSIX
def test_full_disk_keeps_finished_chunks(images, contract, tmp_path, expected_files):
    """Simulate a full disk with a file size limit, so that a write fails in the middle of a batch."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128 + 20 * 192 + 7, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cache_dir=.*full.* kept in .*\.unfinished.*(?i:free some).*resume"):
            open_cache(Encoder(), contract, images, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    encoder = Encoder()
    assert read_files(open_cache(encoder, contract, images, tmp_path / "cache").path) == expected_files
    assert encoder.calls == 8, "two of four chunks should be kept"


def test_concurrent_callers_encode_the_cache_once(images, contract, tmp_path, expected_files, caplog):
    encoders, results = [Encoder(wait_s=0.02) for _ in range(3)], []
    threads = [
        threading.Thread(
            target=lambda encoder=encoder: results.append(open_cache(encoder, contract, images, tmp_path / "cache"))
        )
        for encoder in encoders
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(encoder.calls for encoder in encoders) == [0, 0, 16]
    assert len(results) == 3 and read_files(results[0].path) == expected_files
    assert "Another process is creating" in caplog.text and "Waiting" in caplog.text


def test_flipped_bits_are_rejected_or_have_no_effect(images, contract, tmp_path, expected_files):
    """Flip a bit in every byte of the JSON files and of the .npy header, and in every fifth byte of the moments."""
    folder = open_cache(Encoder(), contract, images, tmp_path).path
    expected, num_flipped, num_rejected = open_cache(Encoder(0), contract, images, tmp_path).moments.tobytes(), 0, 0
    for name, content in expected_files.items():
        step = 5 if name == "moments.npy" else 1
        for position in (*range(min(128, len(content))), *range(128, len(content), step)):
            corrupted = bytearray(content)
            corrupted[position] ^= 1
            (folder / name).write_bytes(corrupted)
            num_flipped += 1
            try:
                latents = open_cache(Encoder(0), contract, images, tmp_path)
                assert name != "moments.npy" and latents.moments.tobytes() == expected, (name, position)
            except UserError as error:
                num_rejected += 1
                assert str(folder) in str(error), (name, position)
                if (name, position) == ("moments.npy", 128 + 5 * 660):
                    assert re.search(r"moments\.npy.*modified.*images: 16 to 23\..*Delete", str(error))
        (folder / name).write_bytes(content)
    print(f"{num_rejected} of {num_flipped} flipped bits were rejected, the rest had no effect")
    assert num_flipped > 1800 and num_rejected > 0.97 * num_flipped


@pytest.mark.parametrize("interrupted", [False, True], ids=["finished", "interrupted"])
def test_read_error_during_verification_keeps_the_cache(images, contract, tmp_path, monkeypatch, interrupted):
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            open_cache(Encoder(5), contract, images, tmp_path)
    else:
        open_cache(Encoder(), contract, images, tmp_path)

    def raise_io_error(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("ldm.files.arrays._digest", raise_io_error)
        with pytest.raises(UserError, match=r"cannot be read \(Input/output error\).*not modified"):
            open_cache(Encoder(0), contract, images, tmp_path)
    encoder = Encoder()
    open_cache(encoder, contract, images, tmp_path)
    assert encoder.calls < 16, "encoded chunks should be kept"


@pytest.mark.parametrize("file", ["moments.npy", "contract.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "extended"])
def test_open_rejects_damaged_files_with_a_remedy(images, contract, tmp_path, file, damage):
    path = open_cache(Encoder(), contract, images, tmp_path).path / file
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "extended": content + b"x"}[damage])
    with pytest.raises(UserError, match="(?i)delete|once its folder is deleted"):
        open_cache(Encoder(0), contract, images, tmp_path)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(LatentContract)])
def test_open_compares_every_contract_field(images, contract, tmp_path, field):
    """The error names the differing field."""
    file = open_cache(Encoder(), contract, images, tmp_path).path / "contract.json"
    content = json.loads(file.read_text())
    value = content[field]
    content[field] = (not value) if isinstance(value, bool) else value + (1 if not isinstance(value, str) else "x")
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{field} is .* in this run but .*latents-|{field} 2\b.*reads .*1\b"):
        open_cache(Encoder(0), contract, images, tmp_path)


def test_cache_without_digests_is_opened_and_logged(images, contract, tmp_path, caplog):
    folder = open_cache(Encoder(), contract, images, tmp_path).path
    (folder / "chunks.json").unlink()
    with caplog.at_level(logging.INFO):
        assert isinstance(open_cache(Encoder(0), contract, images, tmp_path), LatentData)
    assert re.search(r"no digests.*not verified", caplog.text)
