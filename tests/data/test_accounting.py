"""ldm.data.accounting: every file, caption and class is accounted for."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.accounting import account_for, accounting_rows
from ldm.data.cache import check_quarantine, describe_change
from ldm.data.images import prepare
from ldm.data.sources.image_folder import ImageFolder
from ldm.errors import UserError
from tests.data.encoded import prepare_quietly


def save(path: Path, image: Image.Image, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder in which every kind of file occurs once or more."""
    folder = tmp_path / "photos"
    for i in range(12):
        save(folder / "cat" / f"{i}.png", Image.new("RGB", (8, 8), (i, 0, 0)))
        if i != 3:
            (folder / "cat" / f"{i}.txt").write_text(f"cat {i}")
    save(folder / "dog" / "grey.png", Image.new("L", (8, 8), 7))
    save(folder / "dog" / "cmyk.jpg", Image.new("CMYK", (8, 8), (9, 9, 9, 9)))
    save(folder / "dog" / "clear.png", Image.new("RGBA", (8, 8), (1, 2, 3, 4)))
    save(folder / "dog" / "scan.png", Image.fromarray(np.full((8, 8), 4000, np.uint16)))
    save(folder / "dog" / "spacer.png", Image.new("RGB", (1, 1)))
    save(folder / "dog" / "._grey.png", Image.new("RGB", (8, 8)))
    (folder / "dog" / "empty.jpg").touch()
    (folder / "dog" / "page.jpg").write_text("<html>")
    (folder / "dog" / "notes.md").write_text("no image")
    (folder / "dog" / "photo.HEIC").write_bytes(b"?")
    (folder / "dog" / "lost.txt").write_text("no image has this caption")
    (folder / "dog" / "metadata.jsonl").write_text(
        '{"file_name": "grey.png", "text": ["grey", "gray"]}\n{"file_name": "gone.png", "text": "gone"}\n'
    )
    return folder


def test_every_file_is_accounted_for(folder, tmp_path):
    images = prepare_quietly(folder, tmp_path / "cache", max_bad_fraction=0.5)
    accounts = account_for(images)
    assert (accounts["files"], accounts["used"]) == (22, 16)
    assert accounts["train"] + accounts["validation"] == 16
    assert accounts["skipped"] == {
        "too small": 1,
        "empty file": 1,
        "not an image": 1,
        ".md file": 1,
        ".heic file": 1,
        "hidden or system file": 1,
    }
    assert accounts["converted"] == {"grey": 1, "CMYK": 1, "transparent": 1, "16-bit grey": 1}
    assert accounts["captions"] == {"present": 12, "missing": 4, "several": 1}
    assert accounts["classes"] == {"counts": {"cat": 12, "dog": 4}, "missing": 0}
    text = " ".join(accounts["notes"])
    for part in ("1 text file", "dog/lost.txt", "dog/gone.png", "bit_depth=12", "4 images have no caption"):
        assert part in text, part
    assert account_for(prepare_quietly(folder, tmp_path / "cache", max_bad_fraction=0.5)) == accounts, (
        "read from the cache"
    )
    rows = accounting_rows(accounts)
    assert ("classes", "2 (cat 12, dog 4)") in rows and (
        "captions",
        "12 present, 4 missing; 1 image with several",
    ) in rows


class WordTokenizer:
    """Splits captions into words, between two special tokens."""

    def __call__(self, texts, **options):
        return {"input_ids": [[0, *text.split(), 1] for text in texts]}


def test_truncated_captions_are_counted(folder, tmp_path):
    images = prepare_quietly(folder, tmp_path / "cache", max_bad_fraction=0.5)
    captions = account_for(images, WordTokenizer(), max_tokens=3)["captions"]
    assert (captions["truncated"], captions["longest"], captions["max_tokens"]) == (11, 4, 3)
    rows = dict(accounting_rows(account_for(images, WordTokenizer(), max_tokens=4)))
    assert rows["truncated"] == "none at max_tokens=4; the longest has 4 tokens"


def test_many_classes_are_summarised(tmp_path):
    for i in range(30):
        for k in range(1 + i):
            save(tmp_path / "set" / str(i) / f"{k}.png", Image.new("RGB", (8, 8), (i, k, 0)))
    rows = dict(accounting_rows(account_for(prepare_quietly(tmp_path / "set", tmp_path / "cache"))))
    assert rows["classes"] == "30 (largest 29 30, 28 29, 27 28, smallest 2 3, 1 2, 0 1)"


def test_bit_depth_sets_the_white_level_of_16_bit_grey(tmp_path):
    for i, value in enumerate((1000, 4095)):
        save(tmp_path / "scans" / f"{i}.png", Image.fromarray(np.full((8, 8), value, np.uint16)))
    source = ImageFolder(tmp_path / "scans")

    def brightness(bits: int) -> list[int]:
        options = {"resolution": 8, "cache_dir": tmp_path / "cache", "progress": False, "max_bad_fraction": 0.9}
        return prepare(source, bit_depth=bits, val_fraction=None, **options).images[:, 0, 0, 0].tolist()

    assert brightness(16) == [4, 16] and brightness(14) == [16, 64] and brightness(12) == [62, 255]
    assert brightness(10) == [249], "4095 does not fit in 10 bits, so that the image is skipped"
    with pytest.raises(UserError, match="bit_depth=11"):
        brightness(11)


def test_single_image_can_be_prepared_without_a_validation_split(tmp_path):
    save(tmp_path / "one" / "a.png", Image.new("RGB", (8, 8), (1, 2, 3)))
    with pytest.raises(UserError, match="at least 2 different images"):
        prepare_quietly(tmp_path / "one", tmp_path / "cache")
    images = prepare_quietly(tmp_path / "one", tmp_path / "cache", val_fraction=None)
    assert images.train_indices.tolist() == [0] and images.val_indices.tolist() == []
    (tmp_path / "one" / "a.png").write_bytes(b"?")
    for options in ({"val_fraction": None, "max_bad_fraction": None}, {"max_bad_fraction": 0.5}):
        with pytest.raises(UserError, match=r"No image can be read \(1 image in total\): a\.png \(not an image"):
            prepare_quietly(tmp_path / "one", tmp_path / "cache", **options)


def test_suggested_max_bad_fraction_is_valid(tmp_path):
    with pytest.raises(UserError, match=r"max_bad_fraction=0.01 must be at least 0.15 to skip the 1 of 7"):
        check_quarantine(1, 6, 0.01, write_quarantine(tmp_path))
    with pytest.raises(UserError, match=r"must be at least 0\.995 to skip"):
        check_quarantine(995, 5, 0.01, write_quarantine(tmp_path))


def write_quarantine(folder: Path) -> Path:
    (folder / "quarantine.jsonl").write_text('{"name": "a.png", "reason": "damaged", "error": "ValueError"}\n')
    return folder / "quarantine.jsonl"


def test_classes_without_training_images_are_reported(tmp_path):
    for i in range(40):
        save(tmp_path / "set" / str(i) / "0.png", Image.new("RGB", (8, 8), (i, 0, 0)))
    images = prepare_quietly(tmp_path / "set", tmp_path / "cache", val_fraction=0.3)
    held_out = sorted(images.names[i].split("/")[0] for i in images.val_indices)
    (note,) = account_for(images)["notes"]
    assert note.startswith(f"{len(held_out)} classes have no training image") and len(held_out) > 1
    assert set(note.split(": ")[1].removesuffix(", ...").split(", ")) <= set(held_out)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("cat/1.png", "dog/1.png", "preview.png"), "1 image is in none of the class folders: preview.png"),
        (("cat/1.png", "cat/2.png"), "all images are in one folder, cat/"),
    ],
)
def test_folders_that_are_not_classes_are_explained(tmp_path, names, reason):
    for i, name in enumerate(names):
        save(tmp_path / "set" / name, Image.new("RGB", (8, 8), (i, 0, 0)))
    images = prepare_quietly(tmp_path / "set", tmp_path / "cache")
    assert account_for(images)["notes"] == [f"no classes: {reason}"]
    with pytest.raises(UserError, match=f"conditioning=class .*no classes: {reason}"):
        images.require_labels()


def test_changes_between_two_preparations_are_described(tmp_path):
    folder, cache = tmp_path / "set", tmp_path / "cache"
    for i in range(4):
        save(folder / f"{i}.png", Image.new("RGB", (8, 8), (i, 0, 0)))
    first = prepare_quietly(folder, cache)
    assert describe_change(first.path, first.path) is None
    assert describe_change(tmp_path / "gone", first.path) is None
    save(folder / "4.png", Image.new("RGB", (8, 8), (4, 0, 0)))
    second = prepare_quietly(folder, cache)
    assert describe_change(first.path, second.path) == "1 image was added (4.png)"
    assert second.images_fingerprint != first.images_fingerprint
    (folder / "3.txt").write_text("three")
    third = prepare_quietly(folder, cache)
    assert describe_change(second.path, third.path) == "the captions of 1 image changed"
    assert third.images_fingerprint == second.images_fingerprint and third.fingerprint != second.fingerprint
    for name in ("0.png", "1.png"):
        save(folder / name, Image.new("RGB", (8, 8), (9, 9, int(name[0]))))
    fourth = prepare_quietly(folder, cache, resize="pad")
    assert describe_change(third.path, fourth.path) == (
        "2 images were added (0.png, 1.png) and 2 images were removed or changed (0.png, 1.png) and the preparation "
        "changed from {'resolution': 8, 'resize': 'crop'} to {'resolution': 8, 'resize': 'pad'}"
    )
