"""ldm.data.sources.image_folder: selection of files, captions and classes."""

import json
from pathlib import Path

import pytest
from PIL import Image

from ldm.data.pixels import FORMATS, IMAGE_SUFFIXES, decode
from ldm.data.sources.image_folder import ImageFolder
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


def test_images_at_any_depth_are_ordered_by_name(folder):
    for name in (".hidden.png", ".trash/x.png", "deep/._c.webp"):
        write(folder / name)
    (folder / "notes.md").write_text("not an image")
    (folder / "folder.png").mkdir()
    source = ImageFolder(folder)
    assert [record.name for record in source.records()] == ["a.JPG", "b.png", "d.jpeg", "deep/er/c.webp"]
    assert source.num_records == 4 and source.licence is None and source.class_names is None
    assert next(source.records()).load() == (folder / "a.JPG").read_bytes()


SYSTEM_FILES = ("__MACOSX/z.png", "@eaDir/a.png/THUMB.jpg", "#recycle/o.png", "$RECYCLE.BIN/r.png", ".Trash-1000/t.png",
          "deep/@EADIR/x.png", "deep/System Volume Information/s.png", "._a.png", "deep/.hidden/h.png")  # fmt: skip


def test_operating_system_files_are_skipped_silently(folder, caplog):
    original = ImageFolder(folder).identity()
    for name in SYSTEM_FILES:
        write(folder / name)
    (folder / "__MACOSX" / "metadata.csv").write_text("no,table")
    source = ImageFolder(folder)
    assert source.num_records == 4 and source.identity() == original and source.class_names is None
    assert not caplog.records


@pytest.mark.parametrize("runs", ["runs", "deep/experiments"])
def test_runs_and_caches_in_the_folder_are_skipped(folder, runs, caplog):
    original = ImageFolder(folder).identity()
    for name in (f"{runs}/vae/x/images/held_out.png", f"{runs}/demo/samples.png", "cache/x.png", "one run/figure.png"):
        write(folder / name)
    for run in (f"{runs}/vae/x", "one run"):
        (folder / run / "run.json").write_text("{}")
    source = ImageFolder(folder, exclude=[folder / "cache", None])
    assert source.num_records == 4 and source.identity() == original
    assert runs + "/" in caplog.text and "cache/" in caplog.text and "one run/" in caplog.text


def test_run_folder_or_folder_with_only_runs_is_refused(folder, tmp_path_factory):
    (folder / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"path=.* is a run folder"):
        ImageFolder(folder)
    assert ImageFolder(folder / "deep").num_records == 1, "a subfolder of a run can be selected explicitly"
    outside = tmp_path_factory.mktemp("outside")
    write(outside / "runs" / "vae" / "x" / "images" / "a.png")
    (outside / "runs" / "vae" / "x" / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"no images outside the run and cache folders runs/"):
        ImageFolder(outside)
    with pytest.raises(UserError, match="path=.*nowhere is not a folder"):
        ImageFolder(outside / "nowhere")


def test_captions_are_read_from_metadata_jsonl(folder):
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


def test_metadata_takes_precedence_over_text_files(folder):
    (folder / "b.txt").write_text("  a line\nand another \n")
    (folder / "d.txt").write_text("from the text file")
    (folder / "deep" / "er" / "c.txt").write_text("")
    (folder / "metadata.jsonl").write_text('{"file_name": "d.jpeg", "text": "from the metadata"}')
    expected = {"b.png": "a line and another", "d.jpeg": "from the metadata"}
    assert captions_of(folder) == {"a.JPG": None, "deep/er/c.webp": None} | expected


def all_captions(folder: Path, **options) -> dict[str, list[str]]:
    return {
        record.name: [record.caption, *record.more_captions]
        for record in ImageFolder(folder, **options).records()
        if record.caption is not None
    }


@pytest.mark.parametrize(
    "metadata",
    [
        ("metadata.csv", "file_name,text\nb.png,one\nd.jpeg,other\nb.png,two\nb.png,one\nb.png,\n"),
        ("metadata.jsonl", '{"file_name": "b.png", "text": ["one", "two", "one", " "]}\n'
         '{"file_name": "d.jpeg", "text": "other"}\n{"file_name": "a.JPG", "text": []}'),
        ("metadata.jsonl", '{"file_name": "b.png", "text": "one"}\n{"file_name": "./b.png", "text": "two"}\n'
         '{"file_name": "d.jpeg", "text": ["other"]}'),
    ],
)  # fmt: skip
def test_repeated_rows_and_lists_give_several_captions(folder, metadata):
    (folder / "b.txt").write_text("from the text file")
    (folder / metadata[0]).write_text(metadata[1])
    assert all_captions(folder) == {"b.png": ["one", "two"], "d.jpeg": ["other"]}


@pytest.mark.parametrize(
    ("rows", "line", "rule"),
    [
        ("b.png,a red, shiny ball", 2, "number of fields differs from the header (file_name, text)"),
        ("b.png,fine\nd.jpeg", 3, "number of fields differs from the header"),
        ('b.png,fine\nd.jpeg,"a red ball\nb.png,a blue box', 3, "unclosed quote"),
        ('d.jpeg,"a red ball\nb.png,a "blue" box', 2, "',' expected after"),
        (
            'd.jpeg,"a red ball\nb.png,a blue box"',
            2,
            "unclosed quote that extends into the row for b.png",
        ),
        ('"d.jpeg,a red ball\nb.png",a blue box', 2, "must have a file_name without line breaks"),
        (",a red ball", 2, "must have a file_name"),
    ],
)
def test_error_names_the_line_of_a_malformed_csv_row(folder, rows, line, rule):
    (folder / "metadata.csv").write_text(f"file_name,text\n{rows}\n")
    with pytest.raises(UserError) as error:
        captions_of(folder)
    assert f"metadata.csv, line {line}: " in str(error.value) and rule in str(error.value)


@pytest.mark.parametrize(
    "header", ["file_name;text", "file_name\ttext", "b.png,a ball", "name,text", "file_name,text,text"]
)
def test_unknown_column_layout_is_refused(folder, header):
    (folder / "metadata.csv").write_text(f"{header}\nb.png,a ball\n")
    with pytest.raises(UserError, match=r"metadata\.csv, line 1: .*found (0|2)"):
        captions_of(folder)


def test_only_newlines_end_csv_lines(folder):
    """Quoted captions can also contain newlines. Spaces after commas and blank rows are ignored."""
    rows = 'b.png,"a red\u2028ball, ""round"""\r\nd.jpeg,a\x0cform\x85feed\r\na.JPG,"two\r\nlines"\r\n'
    (folder / "metadata.csv").write_bytes(("\ufefffile_name, text\r\n" + rows).encode())
    (folder / "deep" / "metadata.csv").write_text('text, file_name\n  \n,\n"one, deep", er/c.webp\n')
    expected = {"b.png": 'a red\u2028ball, "round"', "d.jpeg": "a\x0cform\x85feed", "a.JPG": "two\nlines"}
    assert captions_of(folder) == expected | {"deep/er/c.webp": "one, deep"}


def test_caption_column_can_be_selected_or_ignored(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "b.png", "title": "bee"}')
    assert captions_of(folder, caption_column="title")["b.png"] == "bee"
    assert captions_of(folder, caption_column=None)["b.png"] is None
    with pytest.raises(UserError, match=r"column 'text'.*found 0.*file_name, title.*data\.caption_column=null"):
        captions_of(folder)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ('{"file_name": "b.png", "text": 3}', "line 1: the caption of b.png must be a string .*not 3"),
        ('{"file_name": "b.png", "text": ["x", 3]}', "must be a string .*not 3"),
        ('{"file_name": "b.png", "text": "x"}\n{broken', "line 2, is not JSON"),
        ("[1]", "line 1, must be a JSON object"),
        ('{"file_name": "b.png", "text": "x"}\n{"image": "d.jpeg", "text": "y"}', "line 2: .*must have a file_name"),
        ('{"text": "x"}', "column 'file_name'.*found 0"),
        ('{"file_name": "images/b.png", "text": "x"}', "None of the images .* exist.*images/b.png"),
        ("\udcff".encode("utf-8", "surrogateescape"), "not valid UTF-8"),
    ],
)
def test_invalid_metadata_is_refused(folder, metadata, message):
    data = metadata if isinstance(metadata, bytes) else metadata.encode()
    (folder / "metadata.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=message):
        captions_of(folder)


@pytest.mark.parametrize(
    ("names", "classes", "labels"),
    [
        (("cat/2.png", "cat/young/3.png", "dog/1.png"), ["cat", "dog"], ["cat", "cat", "dog"]),
        (("cat/1.png", "cat/2.png"), None, [None] * 2),
        (("3.png", "cat/1.png", "dog/2.png"), None, [None] * 3),
        (("10/1.png", "2/1.png"), ["2", "10"], ["10", "2"]),
        (("train/cat/1.png", "val/dog/1.png"), ["cat", "dog"], ["cat", "dog"]),
        (("Train/1.png", "test/1.png"), None, [None] * 2),
        (("plane/1.png", "train/1.png"), ["plane", "train"], ["plane", "train"]),
    ],
)
def test_classes_are_the_top_level_folders_if_they_contain_all_images(tmp_path, names, classes, labels):
    for name in names:
        write(tmp_path / name)
    source = ImageFolder(tmp_path)
    assert source.class_names == classes
    assert [(record.name, record.label) for record in source.records()] == list(zip(names, labels, strict=True))


def test_folders_named_after_splits_are_reported(tmp_path):
    for name in ("train/cat/1.png", "val/dog/1.png"):
        write(tmp_path / name)
    (note,) = ImageFolder(tmp_path).notes
    assert "train/, val/" in note and "not classes" in note


def test_every_suffix_of_a_supported_format_is_used(tmp_path):
    for number, suffix in enumerate(IMAGE_SUFFIXES):
        kind = next(kind for kind, suffixes in FORMATS.items() if suffix in suffixes)
        if kind in Image.SAVE:
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}{suffix.upper()}", kind)
    (tmp_path / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0")
    source = ImageFolder(tmp_path)
    assert source.num_records >= len(IMAGE_SUFFIXES) - len(FORMATS["AVIF"]), "an older Pillow cannot write AVIF"
    assert all(decode(record.load(), 8, "crop").shape == (8, 8, 3) for record in source.records())
    assert source.skipped == {".eps file": 1}


def test_links_to_files_and_folders_are_followed_once(tmp_path):
    write(tmp_path / "elsewhere" / "deep" / "1.png")
    write(tmp_path / "file.png", (9, 9, 9))
    write(tmp_path / "set" / "dog" / "1.png")
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "dog" / "2.png").symlink_to(tmp_path / "file.png")
    (tmp_path / "set" / "dog" / "parent").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "a link").symlink_to(tmp_path / "set" / "dog")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    source = ImageFolder(tmp_path / "set")
    assert [record.name for record in source.records()] == ["cat/deep/1.png", "dog/1.png", "dog/2.png"]
    assert source.class_names == ["cat", "dog"]


def test_identity_changes_with_every_edit(folder):
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
