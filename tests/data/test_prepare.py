"""ldm.data.prepare: atomic preparation, damaged caches, unreadable images and full disks."""

import errno
import io
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm.data.prepare as preparation
from ldm.data import cache as image_cache
from ldm.data.cache import find_cache_damage
from ldm.data.sources.image_folder import ImageFolder
from ldm.errors import UserError
from ldm.files import arrays
from ldm.files.arrays import chunk_digests
from tests.data.encoded import prepare_quietly


@pytest.fixture
def folder(tmp_path) -> Path:
    """Folder of 100 images with red values 0 to 99."""
    folder = tmp_path / "reds"
    folder.mkdir()
    for number in range(100):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number:03}.png")
    return folder


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def entries(cache: Path) -> list[Path]:
    """List the contents of the cache, except lock files."""
    return [path for path in cache.iterdir() if path.suffix != ".lock"]


def flip_bit(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", ["format", "json", "pixels", "no pixels"])
def test_old_or_damaged_cache_is_prepared_again(folder, cache, damage):
    data = prepare_quietly(folder, cache)
    index = data.path / "index.json"
    if damage == "format":
        index.write_text(json.dumps(json.loads(index.read_text()) | {"format": 0}))
    elif damage == "json":
        index.write_text("{")
    else:
        pixels = (data.path / "images.npy").read_bytes()
        (data.path / "images.npy").unlink()
        if damage == "pixels":
            (data.path / "images.npy").write_bytes(pixels[:-100])
    reopened = prepare_quietly(folder, cache)
    assert reopened.path == data.path and reopened.fingerprint == data.fingerprint
    np.testing.assert_array_equal(reopened.images[:, 0, 0, 0], np.arange(100))


@pytest.mark.parametrize("file", ["index.json", "images.npy"])
def test_disk_failure_during_verification_is_not_treated_as_damage(folder, cache, monkeypatch, file):
    data = prepare_quietly(folder, cache)
    inode, original_open = (data.path / "images.npy").stat().st_ino, io.open

    def failing_open(path, *args, **kwargs):
        if str(path).endswith(file):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return original_open(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", failing_open)
        with pytest.raises(UserError, match=r"reds.* cannot be read \(Input/output error\).*not modified"):
            prepare_quietly(folder, cache)
    assert (data.path / "images.npy").stat().st_ino == inode, "the cache is not prepared again"


def test_verified_file_is_not_read_again_until_it_is_modified(folder, cache, monkeypatch):
    path = prepare_quietly(folder, cache).path
    images = path / "images.npy"
    os.utime(images, ns=(0, 10**9))  # an old modification time
    reads = []
    monkeypatch.setattr(arrays, "chunk_digests", lambda *args: reads.append(args) or chunk_digests(*args))
    for _ in range(3):
        prepare_quietly(folder, cache)
    assert len(reads) == 1
    flip_bit(images, 200)
    assert "images 0 to 99 in images.npy" in find_cache_damage(path)
    os.utime(images, ns=(0, 10**9))
    assert find_cache_damage(path) is None, "the modification time is unchanged"
    assert find_cache_damage(path, every_byte=True) is not None


def test_killed_preparation_leaves_no_partial_cache(folder, cache):
    class KilledSource(ImageFolder):
        def records(self):
            for number, record in enumerate(super().records()):
                if number == 50:
                    raise KeyboardInterrupt
                yield record

    with pytest.raises(KeyboardInterrupt):
        prepare_quietly(KilledSource(folder), cache)
    assert entries(cache) == []
    path = prepare_quietly(folder, cache).path
    shutil.rmtree(path)
    (partial := cache / f".partial-0badcafe-{path.name}").mkdir()
    (partial / "images.npy").write_bytes(b"half")
    assert len(prepare_quietly(folder, cache)) == 100
    assert {*cache.iterdir()} == {path, cache / f".{path.name}.lock"}, "the lock file is never deleted"


def test_concurrent_preparations_produce_one_cache(folder, cache):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(prepare_quietly(folder, cache).fingerprint)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and len(set(results)) == 1
    assert len(entries(cache)) == 1


@pytest.fixture
def unreadable_names(folder) -> list[str]:
    """Names of three unreadable files added to `folder`: an empty file, a text file, and an image that is too large."""
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("<html>Not found</html>")
    Image.new("1", (120, 120)).save(folder / "large.png")
    return ["empty.png", "large.png", "text.png"]


def test_unreadable_images_are_skipped_and_listed_up_to_max_bad_fraction(folder, cache, unreadable_names, caplog):
    options = {"max_pixels": 10_000}
    with pytest.raises(UserError, match=r"max_bad_fraction=0\.01 .*0\.03 .*3 of 103 .*large\.png") as error:
        prepare_quietly(folder, cache, **options)
    listing = next(cache.glob("*.quarantine.jsonl"))
    assert str(listing) in str(error.value) and len(listing.read_text().splitlines()) == 3
    assert len(entries(cache)) == 1
    data = prepare_quietly(folder, cache, **options, max_bad_fraction=0.03)
    assert entries(cache) == [data.path] and "3 unreadable images" in caplog.text
    assert data.names == [f"{number:03}.png" for number in range(100)] and data.num_skipped == 3
    np.testing.assert_array_equal(data.images[:, 0, 0, 0], np.arange(100))
    assert [entry["name"] for entry in data.quarantine()] == unreadable_names
    assert {entry["error"] for entry in data.quarantine()} == {"BadImageError"}
    with pytest.raises(UserError, match="3 of 103"):
        prepare_quietly(folder, cache, **options)
    larger = prepare_quietly(folder, cache, max_bad_fraction=0.03)
    assert len(larger) == 101 and larger.path != data.path, "a different pixel limit gives a different set"


def test_insufficient_disk_space_is_detected_before_writing(folder, cache, monkeypatch):
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=19_000))
    with pytest.raises(UserError, match="cache_dir=.*19,000 bytes.*19,200"):
        prepare_quietly(folder, cache)
    assert entries(cache) == []


def test_full_disk_raises_user_error(folder, cache, monkeypatch):
    def raise_disk_full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preparation, "write_index", raise_disk_full)
    with pytest.raises(UserError, match=r"cache_dir=.*full.*disk space"):
        prepare_quietly(folder, cache)
    assert entries(cache) == []


def test_cache_of_an_older_version_is_opened_unchanged(folder, cache):
    """Older caches have no digests, and their list of skipped images has a different file name."""
    data = prepare_quietly(folder, cache)
    index = json.loads((data.path / "index.json").read_text())
    del index["sha256"], index["pixels_sha256"]
    (data.path / "index.json").write_text(json.dumps(index))
    (data.path / "quarantine.jsonl").rename(data.path / "skipped.jsonl")
    (data.path / "skipped.jsonl").write_text('{"name": "a.png", "reason": "empty"}\n')
    inode = (data.path / "index.json").stat().st_ino
    reopened = prepare_quietly(folder, cache)
    assert (reopened.path / "index.json").stat().st_ino == inode
    assert reopened.quarantine() == [{"name": "a.png", "reason": "empty"}]


def test_changed_byte_is_detected_and_images_are_prepared_again(folder, cache, monkeypatch, caplog):
    """Flip one bit at a time, in every 97th byte of the pixels and every 11th byte of the index."""
    monkeypatch.setattr(image_cache, "CHUNK_BYTES", 20 * 192)
    data = prepare_quietly(folder, cache)
    original = {path.name: path.read_bytes() for path in data.path.iterdir()}
    num_flipped = 0
    for name, step in (("images.npy", 97), ("index.json", 11)):
        for position in range(0, len(original[name]), step):
            flip_bit(data.path / name, position)
            assert image_cache.find_cache_damage(data.path), (name, position)
            num_flipped += 1
            (data.path / name).write_bytes(original[name])
    assert num_flipped > 1000 and image_cache.find_cache_damage(data.path) is None
    flip_bit(data.path / "images.npy", -1)
    reopened = prepare_quietly(folder, cache)
    assert "images 80 to 99 in images.npy" in caplog.text
    assert {path.name: path.read_bytes() for path in reopened.path.iterdir()} == original
