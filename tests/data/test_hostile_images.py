"""Hostile image files: wrong formats, false sizes, endless files, failing disks and unusual names."""

import errno
import json
import os
import random
import re
import struct
import time
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.data import prepare as preparation
from ldm.data.images import ImageData
from ldm.data.pixels import decode, read_image
from ldm.data.sources.base import Record
from ldm.errors import UserError
from ldm.files import reading
from tests.data.encoded import encode, prepare_quietly

NUM_FUZZED_FILES = 2000
POSIX = pytest.mark.skipif(os.name == "nt", reason="these file types do not exist on Windows")


def png(width: int, height: int, data: bytes, *extra_chunks: tuple[bytes, bytes]) -> bytes:
    """Build an 8-bit RGB PNG whose header declares this size, regardless of the data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    chunks = [*(chunk(*args) for args in extra_chunks), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks)


def exif(content: bytes) -> dict[str, bytes]:
    return {"exif": b"Exif\0\0" + content}


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
FRAMES = [NOISE.rotate(90 * turns) for turns in range(3)]
ORIENTATION = b"II*\0\x08\0\0\0\x01\0\x12\x01"  # TIFF, little endian, one entry: the orientation

UNREADABLE = {
    "empty.png": (b"", "empty"),
    "one byte.png": (b"\x89", "not an image"),
    "text.png": (b"<html>Not found</html>", "not an image"),
    "zeros.jpg": (bytes(5000), "not an image"),
    "pickle.png": (b"\x80\x04cos\nsystem\n", "not an image"),
    "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n", "not an image"),
    "truncated.png": (encode(NOISE, "PNG")[:2000], "truncated"),
    "truncated.jpg": (encode(NOISE, "JPEG")[:900], "truncated"),
    "truncated.webp": (encode(NOISE, "WEBP")[:900], "not an image|could not|truncated|failed"),
    "header only.png": (encode(NOISE, "PNG")[:33], "truncated|cannot|not an image"),
    "bomb.png": (png(30_000, 30_000, bytes(90_001) * 20), r"900000000 pixels"),
    "huge bomb.png": (png(2**31 - 1, 2**31 - 1, b""), "pixels"),
    "bomb.bmp.png": (b"BM" + struct.pack("<IIIIiiHH", 90, 0, 54, 40, 60_000, 60_000, 1, 24) + bytes(40), "pixels"),
    "text bomb.png": (png(8, 8, bytes(200), (b"zTXt", b"k\0\0" + zlib.compress(bytes(2**26)))), "too large|truncated"),
    "pixel.png": (encode(NOISE.resize((1, 1)), "PNG"), "1 x 1 pixels.* at least 2"),
    "line.png": (encode(NOISE.resize((64, 1)), "PNG"), "64 x 1 pixels"),
    "float.tiff.png": (encode(Image.new("F", (8, 8), 0.5), "TIFF"), "floating-point"),
}
READABLE = {
    "a png.jpg": encode(NOISE, "PNG"),
    "a jpeg.png": encode(NOISE, "JPEG"),
    "a gif.png": encode(NOISE, "GIF"),
    "a webp.jpeg": encode(NOISE, "WEBP"),
    "cmyk.jpg": encode(NOISE.convert("CMYK"), "JPEG"),
    "16 bit.png": encode(Image.fromarray(np.full((9, 9), 25_700, np.uint16)), "PNG"),
    "palette.png": encode(NOISE.quantize(16), "PNG", transparency=3),
    "animated.webp": encode(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]),
    "animated.png": encode(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]),
    "animated gif.png": encode(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "strip.png": encode(Image.new("RGB", (30_000, 3), (9, 99, 199)), "PNG"),
    "column.jpg": encode(Image.new("RGB", (3, 30_000), (9, 99, 199)), "JPEG"),
    "orientation 999.jpg": encode(NOISE, "JPEG", **exif(ORIENTATION + b"\x03\0\x01\0\0\0\xe7\x03\0\0" + bytes(4))),
    "orientation text.jpg": encode(NOISE, "JPEG", **exif(ORIENTATION + b"\x02\0\x02\0\0\0xy\0\0" + bytes(4))),
    "truncated exif.jpg": encode(NOISE, "JPEG", **exif(b"II*\0\x08\0\0\0\x05\0broken")),
    "huge exif.jpg": encode(NOISE, "JPEG", **exif(b"II*\0\x08\0\0\0\xff\xff" + random.Random(0).randbytes(60_000))),
    "random exif.webp": encode(NOISE, "WEBP", **exif(random.Random(1).randbytes(500))),
    "trailing bytes.png": encode(NOISE, "PNG") + bytes(10_000),
}


def quarantine_reasons(data: ImageData) -> dict[str, str]:
    return {entry["name"]: entry["reason"] for entry in data.quarantine()}


@contextmanager
def bounded(seconds: float, megabytes: float):
    """Assert that the run time and the memory growth of the block stay below these limits."""
    resource = pytest.importorskip("resource")
    initial_kb, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    yield
    assert time.perf_counter() - start < seconds
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - initial_kb) / 1024 < megabytes


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "hostile"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
def test_every_file_of_the_corpus_is_read_or_quarantined(folder, tmp_path, resize):
    for name, content in READABLE.items():
        (folder / name).write_bytes(content)
    for name, (content, _) in UNREADABLE.items():
        (folder / name).write_bytes(content)
    with bounded(seconds=30, megabytes=200):
        data = prepare_quietly(folder, tmp_path / "cache", max_bad_fraction=0.6, resize=resize)
    assert data.names == sorted(READABLE)
    reasons = quarantine_reasons(data)
    assert sorted(reasons) == sorted(UNREADABLE)
    for name, (_, expected) in UNREADABLE.items():
        assert re.search(expected, reasons[name]), (name, reasons[name])
    assert all(entry["error"].endswith(("Error", "Exception")) for entry in data.quarantine())
    for name in ("strip.png", "column.jpg"):  # every resize mode must preserve the colour
        matches = np.abs(data.images[data.names.index(name)].astype(int) - (9, 99, 199)).max(-1) < 30
        assert matches.any(), name


@POSIX
def test_links_and_pipes_named_like_images_are_quarantined(folder, tmp_path):
    for number in range(2):
        (folder / f"{number}.png").write_bytes(encode(NOISE.rotate(90 * number), "PNG"))
    (folder / "folder.png").mkdir()
    (folder / "folder.png" / "inside.png").write_bytes(encode(NOISE.rotate(45), "PNG"))
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "loop").symlink_to(folder)
    (folder / "nowhere.png").symlink_to("absent")
    (folder / "endless.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe.txt")
    with bounded(seconds=20, megabytes=100):
        data = prepare_quietly(folder, tmp_path / "cache", max_bad_fraction=0.8)
    assert data.names == ["0.png", "1.png", "folder.png/inside.png"]
    reasons = quarantine_reasons(data)
    assert sorted(reasons) == ["endless.png", "loop.png", "nowhere.png", "pipe.png"]
    assert "symbolic link" in reasons["loop.png"] and "No such file" in reasons["nowhere.png"]
    assert "not a regular file" in reasons["pipe.png"] and "not a regular file" in reasons["endless.png"]


@contextmanager
def unprivileged():
    """Drop root privileges within the block, because file permissions do not apply to root."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@POSIX
def test_files_and_folders_without_permission_are_quarantined(folder, tmp_path):
    for number in range(2):
        (folder / f"{number}.png").write_bytes(encode(NOISE.rotate(90 * number), "PNG"))
    (folder / "closed.png").write_bytes(encode(NOISE, "PNG"))
    (folder / "closed.png").chmod(0)
    (folder / "closed").mkdir(mode=0)
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    restricted = [parent for parent in tmp_path.parents if parent.stat().st_mode & 0o005 != 0o005]
    modes = {parent: parent.stat().st_mode for parent in (tmp_path, *restricted)}
    for parent in modes:
        parent.chmod(0o755)
    try:
        with unprivileged():
            data = prepare_quietly(folder, cache, max_bad_fraction=0.8)
    finally:
        (folder / "closed").chmod(0o700)
        for parent, mode in modes.items():
            parent.chmod(mode)
    assert data.names == ["0.png", "1.png"]
    assert quarantine_reasons(data) == {"closed.png": "Permission denied", "closed/": "Permission denied"}
    lines = (data.path / "quarantine.jsonl").read_text().splitlines()
    assert {json.loads(line)["error"] for line in lines} == {"PermissionError"}


@POSIX
def test_unprintable_names_are_escaped(folder, tmp_path):
    names = [
        b"new\nline.png",
        b"caf\xe9.png",
        b"\x1b[31mred.png",
        "sep\u2028arated.png".encode(),
        "ünï 🦊.png".encode(),
    ]
    for number, name in enumerate(names):
        Path(os.fsdecode(bytes(folder) + b"/" + name)).write_bytes(encode(NOISE.rotate(20 * number), "PNG"))
    Path(os.fsdecode(bytes(folder) + b"/broken\xff\n.png")).write_bytes(b"")
    data = prepare_quietly(folder, tmp_path / "cache", max_bad_fraction=0.5)
    expected = ["new\\nline.png", "caf\\udce9.png", "\\x1b[31mred.png", "sep\\u2028arated.png", "ünï 🦊.png"]
    assert sorted(data.names) == sorted(expected)
    assert quarantine_reasons(data) == {"broken\\udcff\\n.png": "the file is empty"}
    assert prepare_quietly(folder, tmp_path / "cache", max_bad_fraction=0.5).path == data.path
    with pytest.raises(UserError, match=r"broken\\udcff\\n\.png \(the file is empty\)"):
        prepare_quietly(folder, tmp_path / "cache")


@pytest.fixture
def no_retry_delay(monkeypatch) -> None:
    monkeypatch.setattr(reading, "RETRY_DELAY_S", 0)
    reading._warned_reasons.clear()


def make_reads_fail(monkeypatch, code: int, times: int) -> None:
    """Make the first `times` reads of every file fail with this errno code."""
    read, attempts = reading._read_once, {}

    def fail_first_reads(path):
        attempts[path] = attempts.get(path, 0) + 1
        if attempts[path] <= times:
            raise OSError(code, os.strerror(code), str(path))
        return read(path)

    monkeypatch.setattr(reading, "_read_once", fail_first_reads)


def write_twenty_images(folder: Path) -> Path:
    for number in range(20):
        (folder / f"{number:02}.png").write_bytes(encode(NOISE.rotate(9 * number), "PNG"))
    return folder


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "ECONNRESET"])
def test_transient_disk_failure_is_retried(folder, tmp_path, monkeypatch, no_retry_delay, caplog, name):
    make_reads_fail(monkeypatch, getattr(errno, name), times=1)
    data = prepare_quietly(write_twenty_images(folder), tmp_path / "cache")
    assert len(data) == 20 and data.num_skipped == 0
    assert caplog.text.count("could not be read") == 1, "one warning for twenty files"


def test_permanent_disk_failure_leaves_no_partial_cache(folder, tmp_path, monkeypatch, no_retry_delay):
    make_reads_fail(monkeypatch, errno.EIO, times=2)
    with pytest.raises(UserError, match=r"disk .*hostile .*9 files .*08\.png \(Input/output error\)"):
        prepare_quietly(write_twenty_images(folder), tmp_path / "cache", max_bad_fraction=0.9)
    monkeypatch.undo()
    assert len(prepare_quietly(folder, tmp_path / "cache")) == 20


def test_only_disk_failures_are_retried(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(reading.time, "sleep", waits.append)
    for code, expected in ((errno.ENOENT, []), (errno.EACCES, []), (errno.EIO, [reading.RETRY_DELAY_S])):
        make_reads_fail(monkeypatch, code, times=9)
        with pytest.raises(OSError):
            reading.read_file(tmp_path / "x.png")
        assert waits == expected


def test_read_image_refuses_unreadable_images(tmp_path):
    for name, (content, _) in UNREADABLE.items():
        (tmp_path / "image").write_bytes(content)
        with warnings.catch_warnings(), pytest.raises(UserError, match="could not be read"):
            warnings.simplefilter("ignore")
            read_image(str(tmp_path / "image"), 16)
            raise AssertionError(name)


SEEDS = [
    *(encode(NOISE.resize((24, 20)), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")),
    encode(NOISE.resize((24, 20)).convert("RGBA"), "PNG", optimize=True),
    encode(NOISE.resize((24, 20)).quantize(8), "PNG", transparency=1),
    encode(
        NOISE.resize((24, 20)), "JPEG", progressive=True, **exif(ORIENTATION + b"\x03\0\x01\0\0\0\x06\0\0\0" + bytes(4))
    ),
    encode(NOISE.resize((24, 20)).convert("CMYK"), "JPEG"),
    encode(FRAMES[0].resize((24, 20)), "GIF", save_all=True, append_images=FRAMES[1:]),
    encode(
        FRAMES[0].resize((24, 20)), "WEBP", save_all=True, append_images=[FRAMES[1].resize((24, 20))], lossless=True
    ),
    encode(NOISE.resize((24, 20)).convert("1"), "BMP"),
]
KINDS = ("flip", "cut", "splice", "double", "drop", "huge")
MUTATIONS = st.lists(st.tuples(st.sampled_from(KINDS), st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6)


def mutate(content: bytes, mutations: list[tuple[str, float, int]], donor: bytes) -> bytes:
    data = bytearray(content)
    for kind, fraction, value in mutations:
        at = int(fraction * max(0, len(data) - 1))
        if kind == "flip":
            data[at : at + 1] = bytes([data[at] ^ (value or 1)]) if data else b""
        elif kind == "cut":
            del data[at:]
        elif kind == "splice":
            data[at : at + value] = donor[at : at + 2 * value]
        elif kind == "double":
            data[at:at] = data[at : at + 4 * value]
        elif kind == "drop":
            del data[at : at + value]
        else:  # lengths and sizes are stored in four bytes
            number = (2**31 - 1, 70_000, 0, 2**20)[value // 64]
            data[at : at + 4] = struct.pack((">i", "<i")[value % 2], number)
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
def test_mutated_images_are_read_or_refused():
    """Each file is decoded to the right shape and dtype or has a quarantine reason, in bounded time and memory."""
    sizes, readable = [], []

    @settings(
        max_examples=NUM_FUZZED_FILES,
        derandomize=True,
        database=None,
        deadline=5000,  # ms
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(SEEDS), MUTATIONS, st.sampled_from(SEEDS))
    def fuzz(content, mutations, donor):
        data = mutate(content, mutations, donor)
        sizes.append(len(data))
        result = preparation._read(Record("image", lambda: data), 8, "crop", 2**20, 16)
        if isinstance(result, Exception):
            reason = preparation._reason(result)
            assert reason and len(reason) <= 300 and "\n" not in reason and "0x7" not in reason
            return
        pixels = result[1].pixels
        assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
        readable.append(data)

    with bounded(seconds=60, megabytes=300):
        fuzz()
    num_files, num_readable = len(sizes), len(readable)
    assert num_files >= NUM_FUZZED_FILES and num_files / 20 < num_readable < 0.9 * num_files, (num_files, num_readable)
    for data in readable[::50]:
        np.testing.assert_array_equal(decode(data, 8, "crop"), decode(data, 8, "crop"), "decoding is deterministic")
