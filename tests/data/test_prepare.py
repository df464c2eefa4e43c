"""ldm.data.prepare: whole or not at all, what cannot be read, what does not fit."""

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
from ldm.data.cache import damage
from ldm.data.sources.image_folder import ImageFolder
from ldm.errors import UserError
from ldm.files import arrays
from ldm.files.arrays import digests
from tests.data.encoded import open_quietly


@pytest.fixture
def folder(tmp_path) -> Path:
    """A hundred images, whose reds count from 0."""
    folder = tmp_path / "reds"
    folder.mkdir()
    for number in range(100):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number:03}.png")
    return folder


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def remains(cache: Path) -> list[Path]:
    """All but the empty files that lock."""
    return [path for path in cache.iterdir() if path.suffix != ".lock"]


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", ["format", "json", "pixels", "no pixels"])
def test_an_old_or_damaged_cache_is_prepared_again(folder, cache, damage):
    data = open_quietly(folder, cache)
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
    again = open_quietly(folder, cache)
    assert again.path == data.path and again.fingerprint == data.fingerprint
    np.testing.assert_array_equal(again.images[:, 0, 0, 0], np.arange(100))


@pytest.mark.parametrize("file", ["index.json", "images.npy"])
def test_a_disk_that_fails_while_a_cache_is_compared_is_no_damage(folder, cache, monkeypatch, file):
    data = open_quietly(folder, cache)
    inode, opens = (data.path / "images.npy").stat().st_ino, io.open

    def fails(path, *args, **kwargs):
        if str(path).endswith(file):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return opens(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", fails)
        with pytest.raises(UserError, match=r"reds.* cannot be read \(Input/output error\).*left as it is"):
            open_quietly(folder, cache)
    assert (data.path / "images.npy").stat().st_ino == inode, "nothing is prepared again"


def test_what_was_compared_is_not_read_again_before_it_is_written_to(folder, cache, monkeypatch):
    path = open_quietly(folder, cache).path
    images = path / "images.npy"
    os.utime(images, ns=(0, 10**9))  # long ago
    read = []
    monkeypatch.setattr(arrays, "digests", lambda *given: read.append(given) or digests(*given))
    for _ in range(3):
        open_quietly(folder, cache)
    assert len(read) == 1
    flip(images, 200)
    assert damage(path) == "images 0 to 99 in images.npy changed since the images were prepared"
    os.utime(images, ns=(0, 10**9))
    assert damage(path) is None, "its time says that nothing was written"
    assert damage(path, every_byte=True) is not None


def test_a_killed_preparation_leaves_no_half_cache(folder, cache):
    class Killed(ImageFolder):
        def records(self):
            for number, record in enumerate(super().records()):
                if number == 50:
                    raise KeyboardInterrupt
                yield record

    with pytest.raises(KeyboardInterrupt):
        open_quietly(Killed(folder), cache)
    assert remains(cache) == []
    path = open_quietly(folder, cache).path
    shutil.rmtree(path)
    (left := cache / f".partial-0badcafe-{path.name}").mkdir()
    (left / "images.npy").write_bytes(b"half")
    assert len(open_quietly(folder, cache)) == 100
    assert {*cache.iterdir()} == {path, cache / f".{path.name}.lock"}, "the lock is for whoever waits"


def test_two_preparations_may_race(folder, cache):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(open_quietly(folder, cache).fingerprint)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and len(set(results)) == 1
    assert len(remains(cache)) == 1


@pytest.fixture
def unreadable(folder) -> list[str]:
    """The names of three files in the folder that are no images, or none to decode."""
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("<html>Not found</html>")
    Image.new("1", (120, 120)).save(folder / "large.png")
    return ["empty.png", "large.png", "text.png"]


def test_unreadable_images_are_left_out_and_listed_up_to_a_share_of_them(folder, cache, unreadable, caplog):
    options = {"max_pixels": 10_000}
    with pytest.raises(UserError, match=r"must be at least 0\.03 to skip the 3 of 103 .*large\.png") as caught:
        open_quietly(folder, cache, **options)
    listing = next(cache.glob("*.quarantine.jsonl"))
    assert str(listing) in str(caught.value) and len(listing.read_text().splitlines()) == 3
    assert len(remains(cache)) == 1
    data = open_quietly(folder, cache, **options, max_bad_fraction=0.03)
    assert remains(cache) == [data.path] and "3 unreadable images left out" in caplog.text
    assert data.names == [f"{number:03}.png" for number in range(100)] and data.num_skipped == 3
    np.testing.assert_array_equal(data.images[:, 0, 0, 0], np.arange(100))
    assert [entry["name"] for entry in data.quarantine()] == unreadable
    assert {entry["error"] for entry in data.quarantine()} == {"ValueError"}
    with pytest.raises(UserError, match="3 of 103"):
        open_quietly(folder, cache, **options)
    more = open_quietly(folder, cache, max_bad_fraction=0.03)
    assert len(more) == 101 and more.path != data.path, "another limit of pixels, another set"


def test_too_little_disk_space_is_seen_before_writing(folder, cache, monkeypatch):
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=19_000))
    with pytest.raises(UserError, match="cache_dir=.* has 19,000 bytes free, but the images need 19,200"):
        open_quietly(folder, cache)
    assert remains(cache) == []


def test_a_disk_that_fills_up_is_a_user_error(folder, cache, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preparation, "write_index", full)
    with pytest.raises(UserError, match="filled up"):
        open_quietly(folder, cache)
    assert remains(cache) == []


def test_a_cache_of_before_opens_as_it_is(folder, cache):
    """Without digests and under its list's older name: nobody prepares again for them."""
    data = open_quietly(folder, cache)
    index = json.loads((data.path / "index.json").read_text())
    del index["sha256"], index["pixels_sha256"]
    (data.path / "index.json").write_text(json.dumps(index))
    (data.path / "quarantine.jsonl").rename(data.path / "skipped.jsonl")
    (data.path / "skipped.jsonl").write_text('{"name": "a.png", "reason": "empty"}\n')
    written = (data.path / "index.json").stat().st_ino
    again = open_quietly(folder, cache)
    assert (again.path / "index.json").stat().st_ino == written
    assert again.quarantine() == [{"name": "a.png", "reason": "empty"}]


def test_a_changed_byte_is_named_and_the_images_are_prepared_again(folder, cache, monkeypatch, caplog):
    """Bytes spread over the pixels, and every eleventh of the index."""
    monkeypatch.setattr(image_cache, "CHUNK_BYTES", 20 * 192)
    data = open_quietly(folder, cache)
    before = {path.name: path.read_bytes() for path in data.path.iterdir()}
    flipped = 0
    for name, step in (("images.npy", 97), ("index.json", 11)):
        for position in range(0, len(before[name]), step):
            flip(data.path / name, position)
            assert image_cache.damage(data.path), (name, position)
            flipped += 1
            (data.path / name).write_bytes(before[name])
    assert flipped > 1000 and image_cache.damage(data.path) is None
    flip(data.path / "images.npy", -1)
    again = open_quietly(folder, cache)
    assert "images 80 to 99 in images.npy changed" in caplog.text
    assert {path.name: path.read_bytes() for path in again.path.iterdir()} == before
