"""ldm.data.image_folder: which files count, where captions come from, what makes a class."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from ldm.data.image_folder import ImageFolder
from ldm.data.images import prepare
from ldm.errors import UserError


def write(path: Path, colour=(1, 2, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


def captions_of(folder: Path, **options) -> dict[str, str | None]:
    return {record.name: record.caption for record in ImageFolder(folder, **options).records()}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("b.png", "a.JPG", "deep/er/c.webp", "d.jpeg"):
        write(tmp_path / name)
    return tmp_path


def test_images_at_any_depth_in_the_order_of_their_names(folder):
    for name in (".hidden.png", ".trash/x.png", "deep/._c.webp"):
        write(folder / name)
    (folder / "notes.md").write_text("not an image")
    (folder / "folder.png").mkdir()
    source = ImageFolder(folder)
    assert [record.name for record in source.records()] == ["a.JPG", "b.png", "d.jpeg", "deep/er/c.webp"]
    assert source.num_records == 4 and source.licence is None and source.class_names is None
    assert next(source.records()).load() == (folder / "a.JPG").read_bytes()


def test_a_folder_without_captions(folder):
    assert set(captions_of(folder).values()) == {None}


def test_captions_from_metadata_jsonl(folder):
    rows = [
        {"file_name": "a.JPG", "text": "été, “quoted”", "other": 3},
        {"file_name": "./deep\\er/c.webp", "text": "two\u2028parts"},
        {"file_name": "gone.png", "text": "left over"},
        {"file_name": "d.jpeg", "text": None},
    ]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    expected = {"a.JPG": "été, “quoted”", "b.png": None, "d.jpeg": None, "deep/er/c.webp": "two\u2028parts"}
    assert captions_of(folder) == expected


def test_captions_from_metadata_csv_in_subfolders(folder):
    (folder / "metadata.csv").write_text('\ufefffile_name,text\nb.png,"a, ""b"""\n', encoding="utf-8")
    (folder / "deep" / "metadata.csv").write_text("text,file_name\ndeep one,er/c.webp\n")
    captions = captions_of(folder)
    assert captions["b.png"] == 'a, "b"' and captions["deep/er/c.webp"] == "deep one"


def test_captions_from_text_files_give_way_to_metadata(folder):
    (folder / "b.txt").write_text("  a line\nand another \n")
    (folder / "d.txt").write_text("from the text file")
    (folder / "deep" / "er" / "c.txt").write_text("")
    (folder / "metadata.jsonl").write_text('{"file_name": "d.jpeg", "text": "from the metadata"}')
    expected = {"b.png": "a line and another", "d.jpeg": "from the metadata"}
    assert captions_of(folder) == {"a.JPG": None, "deep/er/c.webp": None} | expected


def test_the_caption_column_can_be_named_or_left_unread(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "b.png", "title": "bee"}')
    assert captions_of(folder, caption_column="title")["b.png"] == "bee"
    assert captions_of(folder, caption_column=None)["b.png"] is None
    with pytest.raises(UserError, match=r"no column 'text'.*file_name, title.*data\.caption_column=null"):
        captions_of(folder)


def test_missing_captions_are_an_error_only_when_text_is_asked_for(folder, tmp_path_factory):
    for number, name in enumerate(("a.JPG", "b.png", "d.jpeg")):
        write(folder / name, (number * 90, 0, 0))
    (folder / "b.txt").write_text("bee")
    data = prepare(ImageFolder(folder), resolution=8, cache_dir=tmp_path_factory.mktemp("c"), progress=False)
    assert data.captions == [None, "bee", None, None]
    with pytest.raises(UserError, match=r"3 of 4 images have no caption: a\.JPG, d\.jpeg, deep/er/c\.webp"):
        data.require_captions()


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ('{"file_name": "b.png", "text": 3}', "must be text, not 3"),
        ('{"file_name": "b.png", "text": "x"}\n{broken', "line 2, is not JSON"),
        ("[1]", "line 1, must be a JSON object"),
        ('{"text": "x"}', "no column 'file_name'"),
        ('{"file_name": "images/b.png", "text": "x"}', "names no image that exists.*images/b.png"),
        ("\udcff".encode("utf-8", "surrogateescape"), "not UTF-8"),
    ],
)
def test_damaged_metadata_is_named(folder, metadata, words):
    data = metadata if isinstance(metadata, bytes) else metadata.encode()
    (folder / "metadata.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=words):
        captions_of(folder)


def test_classes_are_the_folders_at_the_first_level(tmp_path):
    for name in ("dog/1.png", "cat/2.png", "cat/young/3.png"):
        write(tmp_path / name)
    source = ImageFolder(tmp_path)
    assert source.class_names == ["cat", "dog"]
    assert [(record.name, record.label) for record in source.records()] == [
        ("cat/2.png", 0),
        ("cat/young/3.png", 0),
        ("dog/1.png", 1),
    ]


@pytest.mark.parametrize("names", [("cat/1.png", "cat/2.png"), ("cat/1.png", "dog/2.png", "3.png")])
def test_one_folder_or_an_image_outside_makes_no_classes(tmp_path, names):
    for name in names:
        write(tmp_path / name)
    source = ImageFolder(tmp_path)
    assert source.class_names is None
    assert {record.label for record in source.records()} == {None}


def test_any_edit_is_a_new_identity(folder):
    identities = [ImageFolder(folder).identity()]
    (folder / "b.txt").write_text("bee")
    identities.append(ImageFolder(folder).identity())
    write(folder / "b.png", (9, 9, 9))
    identities.append(ImageFolder(folder).identity())
    write(folder / "new.png")
    identities.append(ImageFolder(folder).identity())
    identities.append(ImageFolder(folder, caption_column=None).identity())
    assert len({json.dumps(identity) for identity in identities}) == 5
    assert ImageFolder(folder).identity() == ImageFolder(str(folder)).identity()


def test_the_cache_is_named_after_the_folder(tmp_path):
    write(tmp_path / "my photos (2024)" / "a.png")
    assert ImageFolder(tmp_path / "my photos (2024)").name == "my-photos-2024"


def test_a_missing_or_empty_folder(tmp_path):
    with pytest.raises(UserError, match=r"data\.path=.*nowhere is not a folder"):
        ImageFolder(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"holds no images.*\.png, \.jpg, \.jpeg, \.webp"):
        ImageFolder(tmp_path)


def test_a_photograph_with_broken_metadata_is_still_read(tmp_path):
    """Pillow warns of it; nobody who prepares a folder of photographs can act on that."""
    for number in range(2):
        buffer = io.BytesIO()
        exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x05\x00broken"
        Image.new("RGB", (8, 8), (number * 200, 0, 0)).save(buffer, "JPEG", exif=exif)
        (tmp_path / f"{number}.jpg").write_bytes(buffer.getvalue())
    data = prepare(ImageFolder(tmp_path), resolution=8, cache_dir=tmp_path / "cache", progress=False)
    assert len(data) == 2
