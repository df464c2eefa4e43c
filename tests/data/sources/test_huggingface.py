"""ldm.data.sources.huggingface with local datasets in the hub's formats, downloaded and streamed."""

import json
import sys
from pathlib import Path

import pytest

from ldm.data.images import prepare
from ldm.data.sources.huggingface import HuggingFace
from ldm.errors import UserError
from tests.data.encoded import png

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def hub_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


COLUMNS = {
    "image": [{"bytes": png(number), "path": None} for number in range(6)],
    "text": ["zero", "one", "", None, "four", "five"],
    "label": [0, 1, 0, 1, -1, None],
}
FEATURES = {
    "image": datasets.Image(),
    "text": datasets.Value("string"),
    "label": datasets.ClassLabel(names=["even", "odd"]),
}


def dataset(**changes) -> "datasets.Dataset":
    columns = {name: values for name, values in (COLUMNS | changes).items() if values is not None}
    features = {name: feature for name, feature in FEATURES.items() if name in columns and name not in changes}
    inferred = datasets.Dataset.from_dict(columns).features
    return datasets.Dataset.from_dict(columns, features=datasets.Features(inferred | features))


@pytest.fixture
def parquet(tmp_path) -> Path:
    folder = tmp_path / "reds"
    folder.mkdir()
    dataset().to_parquet(folder / "train.parquet")
    return folder


@pytest.mark.parametrize("options", [{}, {"streaming": True, "num_images": 6}], ids=["downloaded", "streamed"])
def test_parquet_folder_is_read_completely(parquet, tmp_path, options):
    source = HuggingFace(str(parquet), **options)
    data = prepare(source, resolution=8, cache_dir=tmp_path / "cache", progress=False)
    assert data.name == "reds" and data.licence is None
    assert data.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert data.captions == ["zero", "one", None, None, "four", "five"]
    assert data.labels == [0, 1, 0, 1, None, None]
    assert data.class_names == ["even", "odd"]
    assert data.names[0] == "train[0]"


@pytest.mark.parametrize("streaming", [False, True])
def test_num_images_limits_the_dataset_to_its_first_images(parquet, streaming):
    source = HuggingFace(str(parquet), streaming=streaming, num_images=2)
    assert source.num_records == 2
    assert [record.load() for record in source.records()] == [png(0), png(1)]
    assert HuggingFace(str(parquet), num_images=100).num_records == 6, "limited by the size of the dataset"


@pytest.mark.parametrize("options", [{}, {"streaming": True, "num_images": 2}], ids=["downloaded", "streamed"])
def test_imagefolder_layout_is_read(tmp_path, options):
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.png").write_bytes(png(number))
    rows = [{"file_name": f"{number}.png", "caption": f"red {number}"} for number in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = list(HuggingFace(str(folder), caption_column="caption", **options).records())
    assert [record.load() for record in records] == [png(0), png(1)]
    assert [record.caption for record in records] == ["red 0", "red 1"]


def test_parquet_file_and_datasets_saved_to_disk_are_read(parquet, tmp_path):
    dataset().save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": dataset()}).save_to_disk(tmp_path / "splits")
    for path, split in (
        (parquet / "train.parquet", "train"),
        (tmp_path / "saved", "train"),
        (tmp_path / "splits", "test"),
    ):
        assert [record.load() for record in HuggingFace(str(path), split=split).records()][5] == png(5)
    for folder, existing in (("splits", "test"), ("saved", "train")):
        with pytest.raises(UserError, match=rf"data\.split=nope .*{folder} are: {existing}"):
            list(HuggingFace(str(tmp_path / folder), split="nope").records())


@pytest.mark.parametrize("layout", ["saved", "splits", "parquet"])
def test_split_expressions_select_rows_of_every_layout(tmp_path, parquet, layout):
    dataset().save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset(), "test": dataset()}).save_to_disk(tmp_path / "splits")
    path = parquet if layout == "parquet" else tmp_path / layout
    expressions = {"train[:2]": [0, 1], "train[-1:]": [5], "train[50%:]": [3, 4, 5], "train[:1]+train[4:5]": [0, 4]}
    if layout == "splits":
        expressions["train+test[:1]"] = [0, 1, 2, 3, 4, 5, 0]
    for split, rows in expressions.items():
        records = HuggingFace(str(path), split=split).records()
        assert [record.load() for record in records] == [png(row) for row in rows], split
    with pytest.raises(UserError, match=r"data\.split=train\[:1\] .*streaming=true.*splits of .*: train"):
        list(HuggingFace(str(parquet), split="train[:1]", streaming=True, num_images=2).records())


@pytest.mark.parametrize(
    "labels", [["b", "a", "b", "c", None, "a"], [3, 7, -1, 3, None, 7], [1.0, 2.0, None, float("nan"), 1.0, 2.0]]
)
def test_labels_are_class_names(tmp_path, labels):
    dataset(label=labels).save_to_disk(tmp_path / "saved")
    source = HuggingFace(str(tmp_path / "saved"))
    expected = [None if value is None or value != value else value for value in labels]
    assert [record.label for record in source.records()] == expected and source.class_names is None
    assert all(isinstance(record.label, str | int | None) for record in source.records())


def test_named_classes_mark_missing_labels_with_minus_one(tmp_path):
    names = datasets.ClassLabel(names=["cat", "dog"])
    dataset(label=[0, 1, -1, 0, 1, -1]).cast_column("label", names).save_to_disk(tmp_path / "saved")
    source = HuggingFace(str(tmp_path / "saved"))
    assert [record.label for record in source.records()] == [0, 1, None] * 2 and source.class_names == ["cat", "dog"]


def test_blank_captions_are_missing(tmp_path):
    dataset(text=["a cat", "  ", "", None, "\n", "dog "]).save_to_disk(tmp_path / "saved")
    captions = [record.caption for record in HuggingFace(str(tmp_path / "saved")).records()]
    assert captions == ["a cat", None, None, None, None, "dog "]


def test_single_files_must_be_parquet(tmp_path, parquet):
    upper = tmp_path / "UP.PARQUET"
    upper.write_bytes((parquet / "train.parquet").read_bytes())
    assert HuggingFace(str(upper)).num_records == 6
    (tmp_path / "0.tar").touch()
    with pytest.raises(UserError, match=rf"0\.tar is a file.*\.parquet.*data\.path={tmp_path}"):
        list(HuggingFace(str(tmp_path / "0.tar")).records())


def test_empty_label_and_column_of_image_lists_are_rejected(tmp_path):
    dataset(label=["dog", "cat", ""] * 2).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="label_column=label .*empty string in row 2"):
        list(HuggingFace(str(tmp_path / "saved")).records())
    lists = datasets.Dataset.from_dict({"image": [[{"bytes": png(0), "path": None}]] * 2})
    lists.cast(datasets.Features({"image": datasets.Sequence(datasets.Image())})).save_to_disk(tmp_path / "lists")
    with pytest.raises(UserError, match=r"image_column=image .*one image per row, .*List\(Image"):
        list(HuggingFace(str(tmp_path / "lists")).records())


def test_default_columns_can_be_missing(tmp_path):
    dataset(text=None, label=None).save_to_disk(tmp_path / "saved")
    record = next(HuggingFace(str(tmp_path / "saved")).records())
    assert record.caption is None and record.label is None


@pytest.mark.parametrize("option", ["image_column", "caption_column", "label_column"])
def test_configured_columns_must_exist(parquet, option):
    with pytest.raises(UserError, match=rf"no column 'nope'.*data\.{option}=.*image, text, label"):
        list(HuggingFace(str(parquet), **{option: "nope"}).records())


@pytest.mark.parametrize(("column", "value"), [("text", 3), ("label", 0.5), ("label", [1, 2])])
def test_columns_of_the_wrong_type_are_refused(tmp_path, column, value):
    dataset(**{column: [value] * 6}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=f"{column} must be a column of .*{value}.*null"):
        list(HuggingFace(str(tmp_path / "saved")).records())


def test_row_without_an_image_is_unreadable(tmp_path):
    images = [None, *COLUMNS["image"][1:]]
    dataset(image=images).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    source = HuggingFace(str(tmp_path / "saved"))
    with pytest.raises(UserError, match=r"1 of 6 .*train\[0\] \(.*no image\)"):
        prepare(source, resolution=8, cache_dir=tmp_path / "cache", progress=False)


def test_identity_depends_on_files_and_options(parquet):
    def identity(**options):
        return json.dumps(HuggingFace(str(parquet), **options).identity())

    identities = {identity(), identity(split="test"), identity(num_images=3), identity(revision="v2")}
    dataset(text=["other"] * 6).to_parquet(parquet / "train.parquet")
    identities.add(identity())
    assert len(identities) == 5


def test_broken_stream_reports_the_number_of_images_read():
    def broken_stream():
        yield {"image": {"bytes": png(0), "path": None}}
        raise ConnectionError("reset by peer")

    features = datasets.Features({"image": datasets.Image()})
    source = HuggingFace("user/set", streaming=True, num_images=6)
    source._dataset = datasets.IterableDataset.from_generator(broken_stream, features=features)
    with pytest.raises(UserError, match="user/set .* 1 images.*reset by peer"):
        list(source.records())


@pytest.mark.parametrize("count", [None, 0])
def test_streaming_requires_num_images(count):
    with pytest.raises(UserError, match="num_images"):
        HuggingFace("user/set", streaming=True, num_images=count)


def test_missing_dataset_or_split_is_refused(parquet):
    with pytest.raises(UserError, match=r"user/absent .*cannot be opened: .*data\.path"):
        list(HuggingFace("user/absent").records())
    with pytest.raises(UserError, match="split=val"):
        list(HuggingFace(str(parquet), split="val").records())
    assert HuggingFace("user/absent").name == "user-absent"


def test_missing_package_error_suggests_pip_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'ldm-trainer\[data\]'"):
        list(HuggingFace("user/set").records())


@pytest.mark.parametrize("options", [{}, {"streaming": True, "num_images": 6}], ids=["downloaded", "streamed"])
def test_list_of_texts_gives_several_captions(tmp_path, options):
    texts = [["one", "two", "one"], ["three"], [], None, ["", "four"], ["five", "six"]]
    dataset(text=texts).to_parquet(tmp_path / "train.parquet")
    data = prepare(
        HuggingFace(str(tmp_path / "train.parquet"), **options), resolution=8, cache_dir=tmp_path / "c", progress=False
    )
    assert data.captions == ["one", "three", None, None, "four", "five"]
    assert data.more_captions == {0: ["two"], 5: ["six"]} and data.captions_of(5) == ["five", "six"]


def test_folder_that_contains_runs_is_refused(tmp_path):
    """`datasets` would read the figures of runs as data."""
    folder = tmp_path / "files"
    run = folder / "experiments" / "vae" / "x"
    (run / "images").mkdir(parents=True)
    for number in range(2):
        (folder / f"{number}.png").write_bytes(png(number))
    (run / "images" / "figure.png").write_bytes(png(7))
    assert HuggingFace(str(folder)).num_records == 3
    (run / "run.json").write_text("{}")
    (folder / "@eaDir").mkdir()
    with pytest.raises(UserError, match=r"contains @eaDir/, experiments/, .*data=image_folder"):
        HuggingFace(str(folder)).num_records  # noqa: B018
    with pytest.raises(UserError, match="is a run folder"):
        HuggingFace(str(run)).num_records  # noqa: B018
