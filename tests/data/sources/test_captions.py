"""ldm.data.sources.captions: which text belongs to which image."""

import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from ldm.data.sources.image_folder import ImageFolder


def save(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)


def read(folder: Path) -> tuple[dict[str, str | None], list[str]]:
    """Return the caption of each image, and the notes of the source."""
    source = ImageFolder(folder)
    return {record.name: record.caption for record in source.records()}, source.notes


NFC, NFD = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("image", "file"),
    [("a.png", "a.TXT"), ("a.png", "a.png.txt"), ("a.png", "A.txt"), ("A.PNG", "a.txt"), (NFD, NFC[:-4] + ".txt")],
)
def test_text_files_match_in_spite_of_case_suffix_and_normalisation(tmp_path, image, file):
    save(tmp_path, image, "b.png")
    (tmp_path / file).write_text("a ball")
    assert read(tmp_path) == ({image: "a ball", "b.png": None}, [])


@pytest.mark.parametrize(
    ("image", "listed", "file"),
    [
        ("a b.png", "a%20b.png", "metadata.jsonl"),
        (NFD, NFC, "metadata.jsonl"),
        ("A.PNG", "a.png", "metadata.jsonl"),
        ("a.png", "a.png", "Metadata.jsonl"),
        ("a%20b.png", "a%20b.png", "METADATA.JSONL"),
    ],
)
def test_metadata_rows_match_in_spite_of_case_encoding_and_normalisation(tmp_path, image, listed, file):
    save(tmp_path, image, "b.png")
    (tmp_path / file).write_text(f'{{"file_name": "{listed}", "text": "a ball"}}\n', encoding="utf-8")
    assert read(tmp_path) == ({image: "a ball", "b.png": None}, [])


def test_names_that_match_several_images_are_left_unmatched_and_named(tmp_path):
    save(tmp_path, "a.png", "A.PNG", "b.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "A.png", "text": "which?"}\n{"file_name": "b.png", "text": "b"}\n'
    )
    captions, (note,) = read(tmp_path)
    assert captions == {"A.PNG": None, "a.png": None, "b.png": "b"}
    assert "A.png" in note
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "A.Txt").write_text("which?")
    captions, (note,) = read(tmp_path)
    assert captions == dict.fromkeys(captions) and "A.Txt" in note


def test_exact_names_win_over_similar_ones(tmp_path):
    save(tmp_path, "a.png", "A.PNG")
    (tmp_path / "a.txt").write_text("lower case")
    (tmp_path / "A.txt").write_text("upper case")
    assert read(tmp_path)[0] == {"a.png": "lower case", "A.PNG": "upper case"}


def test_nearest_metadata_file_wins_and_disagreements_are_named(tmp_path):
    save(tmp_path, "a/1.png", "z/1.png", "z/2.png")
    (tmp_path / "metadata.jsonl").write_text(
        "".join(f'{{"file_name": "{name}", "text": "root"}}\n' for name in ("a/1.png", "z/1.png", "z/2.png"))
    )
    for folder in "az":
        (tmp_path / folder / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "nearest"}\n')
    captions, (note,) = read(tmp_path)
    assert captions == {"a/1.png": "nearest", "z/1.png": "nearest", "z/2.png": "root"}
    for part in ("2 images", "a/1.png", "root", "nearest", "a/metadata.jsonl"):
        assert part in note


def test_utf_16_without_a_byte_order_mark_is_rejected(tmp_path):
    save(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_bytes("a cat".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"a\.txt contains null characters.*UTF-8"):
        read(tmp_path)


def test_captions_of_linked_folders_are_read_but_not_other_links(tmp_path):
    save(tmp_path / "elsewhere", "1.png")
    (tmp_path / "elsewhere" / "1.txt").write_text("linked")
    save(tmp_path / "set", "dog/1.png")
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere")
    assert read(tmp_path / "set")[0] == {"dog/1.png": None, "cat/1.png": "linked"}
    (tmp_path / "secret.txt").write_text("password")
    (tmp_path / "set" / "dog" / "1.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match=r"dog/1\.txt is a link to .*secret\.txt"):
        read(tmp_path / "set")
