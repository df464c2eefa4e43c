"""ldm.data.preparation: whole or not at all, what cannot be read, what does not fit."""

import errno
import io
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm.data.preparation as preparation
from ldm.data.image_folder import ImageFolder
from ldm.data.images import ImageData, prepare
from ldm.errors import UserError


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


def open_quietly(source, cache_dir, **options) -> ImageData:
    return prepare(source, **{"resolution": 8, "cache_dir": cache_dir, "progress": False, **options})


@pytest.mark.parametrize("damage", ["format", "json", "pixels", "no pixels"])
def test_an_old_or_damaged_cache_is_prepared_again(folder, cache, damage):
    data = open_quietly(ImageFolder(folder), cache)
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
    again = open_quietly(ImageFolder(folder), cache)
    assert again.path == data.path and again.fingerprint == data.fingerprint
    np.testing.assert_array_equal(again.images[:, 0, 0, 0], np.arange(100))


def test_a_killed_preparation_leaves_no_half_cache(folder, cache):
    class Killed(ImageFolder):
        def records(self):
            for number, record in enumerate(super().records()):
                if number == 50:
                    raise KeyboardInterrupt
                yield record

    with pytest.raises(KeyboardInterrupt):
        open_quietly(Killed(folder), cache)
    assert list(cache.iterdir()) == []
    assert len(open_quietly(ImageFolder(folder), cache)) == 100


def test_two_preparations_may_race(folder, cache):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(open_quietly(ImageFolder(folder), cache).fingerprint))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and len(set(results)) == 1
    assert len(list(cache.iterdir())) == 1


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def unreadable(folder, monkeypatch) -> list[str]:
    """The names of six files in the folder that are no images, or none to decode."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    contents = {
        "truncated.png": encode(Image.effect_noise((64, 64), 50))[:2000],
        "truncated.jpg": encode(Image.effect_noise((64, 64), 50), "JPEG")[:700],
        "empty.png": b"",
        "text.png": b"<html>Not found</html>",
        "bomb.png": encode(Image.new("1", (300, 300))),
        "large.png": encode(Image.new("1", (120, 120))),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return sorted(contents)


def test_unreadable_images_are_skipped_and_listed(folder, cache, unreadable, caplog):
    data = open_quietly(ImageFolder(folder), cache, max_bad_fraction=0.1)
    assert data.names == [f"{number:03}.png" for number in range(100)] and data.num_skipped == 6
    np.testing.assert_array_equal(data.images[:, 0, 0, 0], np.arange(100))
    lines = [json.loads(line) for line in (data.path / "skipped.jsonl").read_text().splitlines()]
    reasons = {line["name"]: line["reason"] for line in lines}
    assert list(reasons) == unreadable
    assert "truncated" in reasons["truncated.png"] and "truncated" in reasons["truncated.jpg"]
    assert "empty" in reasons["empty.png"] and "not an image" in reasons["text.png"]
    assert "bomb" in reasons["bomb.png"] and "bomb" in reasons["large.png"]
    assert "6 unreadable images skipped" in caplog.text


def test_too_many_unreadable_images_are_an_error(folder, cache, unreadable):
    with pytest.raises(UserError, match=r"6 of 106 .*bomb\.png .*max_bad_fraction=0\.06") as caught:
        open_quietly(ImageFolder(folder), cache)
    listing = next(cache.glob("*.skipped.jsonl"))
    assert str(listing) in str(caught.value) and len(listing.read_text().splitlines()) == 6
    assert len(list(cache.iterdir())) == 1
    data = open_quietly(ImageFolder(folder), cache, max_bad_fraction=0.06)
    assert list(cache.iterdir()) == [data.path]
    with pytest.raises(UserError, match="6 of 106"):
        open_quietly(ImageFolder(folder), cache)


def test_too_little_disk_space_is_seen_before_writing(folder, cache, monkeypatch):
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=19_000))
    with pytest.raises(UserError, match=r"19,200 bytes .*19,000 are free.*data\.cache_dir"):
        open_quietly(ImageFolder(folder), cache)
    assert list(cache.iterdir()) == []


def test_a_disk_that_fills_up_is_a_user_error(folder, cache, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preparation, "_move_into_place", full)
    with pytest.raises(UserError, match="filled up"):
        open_quietly(ImageFolder(folder), cache)
    assert list(cache.iterdir()) == []


def test_progress_is_shown_on_stderr(folder, cache, capsys):
    open_quietly(ImageFolder(folder), cache, progress=True)
    captured = capsys.readouterr()
    assert "Preparing reds at 8 px" in captured.err and "100/100" in captured.err and captured.out == ""
