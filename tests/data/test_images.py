"""ldm.data.images: preparation, reopening from the cache, and the split by content."""

import hashlib
import json
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from ldm.data.accounting import account_for
from ldm.data.images import (
    Record,
    default_cache_dir,
    split_by_hash,
    to_uint8,
)
from ldm.data.sources.image_folder import ImageFolder
from ldm.errors import UserError
from tests.data.encoded import png, prepare_quietly


class MemorySource:
    """In-memory source that counts how often an image is loaded."""

    name = "memory"
    licence = "CC0"
    class_names = ["even", "odd"]

    def __init__(self, contents: dict[str, bytes], delay_s: float = 0):
        self.contents, self.delay_s, self.num_records, self.num_loads = contents, delay_s, None, 0

    def identity(self):
        return {"names": sorted(self.contents)}

    def records(self):
        for number, name in enumerate(self.contents):
            yield Record(name, lambda name=name: self._load(name), f"caption {number}", number % 2)

    def _load(self, name):
        self.num_loads += 1
        time.sleep(self.delay_s * (hash(name) % 5))
        return self.contents[name]


@pytest.fixture
def contents() -> dict[str, bytes]:
    return {f"{number:03}.png": png(number) for number in range(100)}


def test_prepared_images_can_be_reopened_and_pickled(tmp_path, contents):
    data = prepare_quietly(MemorySource(contents, delay_s=0.001), tmp_path)
    assert data.images.shape == (100, 8, 8, 3) and data.images.dtype == np.uint8
    assert isinstance(data.images, np.memmap)
    np.testing.assert_array_equal(data.images[:, 0, 0, 0], np.arange(100), "records keep their order")
    assert data.names == list(contents)
    assert data.captions[7] == data.require_captions()[7] == "caption 7"
    assert data.labels[7] == data.require_labels()[7] == 1
    assert data.class_names == ["even", "odd"]
    assert (len(data), data.resolution, data.num_bytes) == (100, 8, 100 * 8 * 8 * 3)
    assert (data.name, data.licence, data.num_skipped) == ("memory", "CC0", 0)
    assert data.path.parent == tmp_path and data.path.name.startswith("memory-")
    assert sorted(path.name for path in data.path.iterdir()) == ["images.npy", "index.json", "quarantine.jsonl"]
    assert list(tmp_path.glob("[!.]*")) == [data.path], "only the lock file remains next to the cache"
    reopened = prepare_quietly(source := MemorySource(contents), tmp_path, val_fraction=0.5)
    assert type(prepare_quietly(source, tmp_path, val_fraction=0).val_fraction) is int, "used in names of latent caches"
    assert source.num_loads == 0 and reopened.path == data.path and reopened.fingerprint == data.fingerprint
    pickled = pickle.dumps(reopened)
    copy = pickle.loads(pickled)
    assert len(pickled) < 1000 and isinstance(copy.images, np.memmap), "workers share the memory pages"
    np.testing.assert_array_equal(copy.val_indices, reopened.val_indices)


def test_batches_are_normalised_and_round_trip(tmp_path, contents):
    data = prepare_quietly(MemorySource(contents), tmp_path)
    batch = data.batch(torch.tensor([3, 1]))
    assert batch.shape == (2, 3, 8, 8) and batch.dtype == torch.float32 and batch.is_contiguous()
    assert batch.min() >= -1 and batch.max() <= 1
    assert batch[0, 0, 0, 0] == pytest.approx(3 / 127.5 - 1)
    expected = torch.from_numpy(np.array(data.images[[3, 1]])).permute(0, 3, 1, 2)
    assert torch.equal(to_uint8(batch), expected)


def test_to_uint8_inverts_every_value_and_clamps():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(values.float() / 127.5 - 1), values)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_split_depends_only_on_content(tmp_path, contents):
    """The split is a partition, adding images moves no existing image, and copies are on the same side."""

    def split_names(contents):
        data = prepare_quietly(MemorySource(contents), tmp_path, val_fraction=0.2)
        assert sorted([*data.train_indices, *data.val_indices]) == list(range(len(contents)))
        assert data.train_indices.dtype == data.val_indices.dtype == np.int64
        return {data.names[i] for i in data.train_indices}, {data.names[i] for i in data.val_indices}

    train, val = split_names(contents)
    assert 10 < len(val) < 35
    larger_train, larger_val = split_names({f"new {n}.png": png(n) for n in range(100, 200)} | contents)
    assert train < larger_train and val < larger_val
    _, val_with_copies = split_names(contents | {f"copy of {name}": data for name, data in contents.items()})
    assert val_with_copies == val | {f"copy of {name}" for name in val}


def test_neither_side_of_the_split_is_empty():
    hashes = ["ff" * 32, "80" * 32, "80" * 32, "70" * 32]
    for fraction, expected in ((0, [3]), (0.05, [3]), (0.48, [3]), (0.6, [1, 2, 3]), (0.9999, [1, 2, 3])):
        train, val = split_by_hash(hashes, fraction)
        assert val.tolist() == expected and len(train) + len(val) == 4


@pytest.mark.parametrize("contents", [{"only.png": png(1)}, {"one.png": png(1), "copy.png": png(1)}])
def test_single_distinct_image_is_refused(tmp_path, contents):
    with pytest.raises(UserError, match="2 different images"):
        prepare_quietly(MemorySource(contents), tmp_path)


def test_fingerprint_depends_on_content_captions_and_transform(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(png(number))

    def fingerprint(**options):
        return prepare_quietly(folder, tmp_path / "cache", **options).fingerprint

    original = fingerprint()
    fingerprints = {original, fingerprint(resolution=16), fingerprint(resize="pad")}
    (folder / "3.png").write_bytes(png(3) + b"\x00")  # a trailing byte: same pixels, different file
    fingerprints.add(fingerprint())
    (folder / "2.txt").write_text("a caption")
    fingerprints.add(fingerprint())
    assert len(fingerprints) == 5
    (folder / "2.txt").unlink()
    (folder / "3.png").write_bytes(png(3))
    assert fingerprint() == original, "the same content has the same fingerprint, regardless of modification times"


def test_fingerprint_is_stable_across_versions(tmp_path, monkeypatch):
    """The fingerprint is the SHA-256 of hashes, captions, labels and transform.

    The digest includes additional captions and colour conversion only if the dataset has any.
    """
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (180, 40 * number, 20)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"number {number}")
    data = prepare_quietly(folder, tmp_path / "c")
    index = json.loads((data.path / "index.json").read_text())
    content = {key: index[key] for key in ("hashes", "captions", "labels", "transform")}
    assert content["captions"] == ["number 0", "number 1", "number 2"] and data.profiles == {}

    def digest(values) -> str:
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    assert data.fingerprint == digest(content)
    rows = [{"file_name": "1.png", "text": ["one", "uno"]}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    multi_caption = prepare_quietly(folder, tmp_path / "c")
    assert multi_caption.fingerprint == digest({**content, "captions": ["number 0", ["one", "uno"], "number 2"]})
    assert multi_caption.captions_of(1) == ["one", "uno"] and multi_caption.more_captions == {1: ["uno"]}

    uncaptioned = prepare_quietly(ImageFolder(folder, caption_column=None), tmp_path / "c")
    xyz_profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    Image.new("RGB", (8, 8), (180, 0, 20)).save(folder / "0.png", icc_profile=xyz_profile)
    unreadable = prepare_quietly(ImageFolder(folder, caption_column=None), tmp_path / "c")
    assert unreadable.profiles == {"unreadable": 1}
    assert account_for(unreadable)["converted"] == {"unreadable colour profile, treated as sRGB": 1}
    hashes = json.loads((unreadable.path / "index.json").read_text())["hashes"]
    without_captions = {"captions": None, "labels": None, "transform": index["transform"]}
    assert unreadable.fingerprint == digest({**without_captions, "hashes": hashes}) != uncaptioned.fingerprint
    monkeypatch.setattr("ldm.data.pixels.to_srgb", lambda image, profile: (image, "converted"))
    converted = prepare_quietly(ImageFolder(folder, caption_column=None), tmp_path / "other")
    assert account_for(converted)["converted"] == {"colour profile": 3}
    assert converted.fingerprint == digest({**without_captions, "hashes": hashes, "colours": "sRGB"})


def test_image_without_file_is_hashed_by_its_pixels(tmp_path):
    class PixelSource(MemorySource):
        def records(self):
            for name in self.contents:
                yield Record(name, lambda name=name: Image.new("L", (8, 8), int(name)))

    data = prepare_quietly(PixelSource({"1": b"", "2": b""}), tmp_path)
    assert len(set(json.loads((data.path / "index.json").read_text())["hashes"])) == 2


def test_source_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="memory.* no images"):
        prepare_quietly(MemorySource({}), tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("resize", "stretch", "'crop', 'pad' or 'squash'"),
        ("resolution", 0, "resolution=0"),
        ("val_fraction", 1.0, "val_fraction=1.0"),
        ("max_bad_fraction", -0.1, "max_bad_fraction"),
    ],
)
def test_error_names_the_invalid_option(tmp_path, contents, option, value, message):
    with pytest.raises(UserError, match=message):
        prepare_quietly(MemorySource(contents), tmp_path, **{option: value})


def test_error_names_images_without_captions_or_labels(tmp_path):
    class OneCaption(MemorySource):
        def records(self):
            for record in super().records():
                is_first = record.name == "a.png"
                yield Record(record.name, record.load, "a" if is_first else None)

    contents = {f"{letter}.png": png(number) for number, letter in enumerate("abcdefghi")}
    data = prepare_quietly(OneCaption(contents), tmp_path)
    assert data.captions[:2] == ["a", None] and data.labels is None
    with pytest.raises(UserError, match=r"8 of 9 images have no captions: b\.png, .* f\.png, \.\.\."):
        data.require_captions()
    with pytest.raises(UserError, match="9 of 9 images have no class labels"):
        data.require_labels()


def test_default_cache_dir_follows_environment_and_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("LDM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert default_cache_dir() == Path("/home/ada/.cache/ldm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert default_cache_dir() == Path("/var/cache/ldm")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "C:/Users/ada/AppData/Local")
    assert default_cache_dir() == Path("C:/Users/ada/AppData/Local/ldm")
