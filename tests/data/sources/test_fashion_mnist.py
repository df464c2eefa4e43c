"""ldm.data.sources.fashion_mnist: small generated IDX files, the hub's format, and the real files if installed."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm.data.sources.fashion_mnist as fashion_mnist
from ldm.data.images import prepare
from ldm.data.sources.fashion_mnist import DEBIAN_PATH, FashionMNIST
from ldm.errors import UserError
from tests.data.encoded import encode

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8)
LABELS = np.array([9, 0, 1, 2, 3, 9], np.uint8)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture(params=["", ".gz"], ids=["raw", "gzipped"])
def folder(request, tmp_path) -> Path:
    for part, rows in (("train", slice(0, 4)), ("t10k", slice(4, 6))):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{request.param}", IMAGES[rows])
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{request.param}", LABELS[rows])
    return tmp_path


def test_both_parts_are_read_with_their_labels(folder):
    source = FashionMNIST(folder)
    assert source.num_records == 6
    data = prepare(source, resolution=28, cache_dir=folder / "cache", progress=False)
    np.testing.assert_array_equal(data.images, np.repeat(IMAGES[..., None], 3, axis=-1))
    assert data.require_labels() == LABELS.tolist()
    assert data.class_names[9] == "Ankle boot" and len(data.class_names) == 10
    assert data.names[3:5] == ["train[3]", "t10k[0]"]
    assert data.captions is None and "MIT" in data.licence


def test_hub_and_files_give_the_same_split(folder, monkeypatch, caplog):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "hf"))
    hub = folder / "hub"
    hub.mkdir()
    for part, rows in (("train", slice(0, 4)), ("test", slice(4, 6))):
        encoded = []
        for pixels in IMAGES[rows]:
            encoded.append({"bytes": encode(Image.fromarray(pixels)), "path": None})
        columns = {"image": encoded, "label": LABELS[rows].tolist()}
        datasets.Dataset.from_dict(columns).to_parquet(hub / f"{part}.parquet")
    monkeypatch.setattr(fashion_mnist, "DEBIAN_PATH", "/absent")
    monkeypatch.setattr(fashion_mnist, "HUB_ID", str(hub))
    from_hub = prepare(FashionMNIST("/absent"), resolution=28, cache_dir=folder / "cache", progress=False)
    assert "/absent does not exist" in caplog.text and str(hub) in caplog.text
    from_files = prepare(FashionMNIST(folder), resolution=28, cache_dir=folder / "cache", progress=False)
    assert from_hub.path != from_files.path
    assert from_hub.fingerprint == from_files.fingerprint
    assert from_hub.class_names == from_files.class_names


def test_unreachable_hub_error_suggests_installing_the_files(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def raise_connection_error(*args, **options):
        raise ConnectionError("no route to the hub.")

    monkeypatch.setattr(datasets, "load_dataset", raise_connection_error)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_PATH", "/absent")
    source = FashionMNIST("/absent")
    with pytest.raises(UserError, match=r"no route.*apt-get install dataset-fashion-mnist.*data\.path=DIR"):
        list(source.records())


def test_configured_folder_must_exist_and_contain_the_files(tmp_path):
    with pytest.raises(UserError, match=r"absent is not a folder.*apt-get install dataset-fashion-mnist"):
        FashionMNIST(tmp_path / "absent")
    with pytest.raises(UserError, match="has no train-images-idx3-ubyte or train-images-idx3-ubyte.gz"):
        FashionMNIST(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "not idx", "too few labels"])
def test_error_names_the_damaged_file(folder, damage):
    images = next(folder.glob("train-images*"))
    labels = next(folder.glob("train-labels*"))
    if damage == "truncated":
        images.write_bytes(images.read_bytes()[:-500])
    elif damage == "not idx":
        images.write_bytes(gzip.compress(b"<html>") if images.suffix == ".gz" else b"<html>")
    else:
        write_idx(labels, LABELS[:1])
    with pytest.raises(UserError, match=f"{images.name}.*apt-get"):
        list(FashionMNIST(folder).records())


@pytest.mark.skipif(not Path(DEBIAN_PATH).is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_installed_files_are_read():
    source = FashionMNIST()
    assert source.num_records == 70_000
    record = next(source.records())
    assert record.load().size == (28, 28) and source.class_names[record.label] == "Ankle boot"
