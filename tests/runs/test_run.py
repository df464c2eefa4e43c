"""ldm.runs.run and ldm.runs.load: opening runs, and finding the autoencoder for stage 2."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from omegaconf import OmegaConf

from ldm.autoencoder.autoencoder import Autoencoder, weights_sha256
from ldm.data.images import prepare
from ldm.data.sources.image_folder import ImageFolder
from ldm.errors import UserError
from ldm.runs.load import find_autoencoder, load_autoencoder
from ldm.runs.run import AutoencoderNotFoundError, Run


def build_autoencoder(seed: int) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(AutoencoderKL(block_out_channels=(8,), latent_channels=3, norm_num_groups=4).eval())


def make_run(folder: Path, seed: int, *, finished: float | None, data: str = "images") -> Run:
    """Create a stage-1 run with untrained weights."""
    config = OmegaConf.create({"data": {"resolution": 8}, "batch": "${data.resolution}"})
    run = Run.create(folder, config, {"stage": "vae", "name": folder.name, "data_fingerprint": data})
    build_autoencoder(seed).save(run.autoencoder_folder)
    run.update(finished=finished)
    return run


def images(fingerprint: str = "images", images_fingerprint: str = "pixels") -> SimpleNamespace:
    return SimpleNamespace(fingerprint=fingerprint, images_fingerprint=images_fingerprint)


def test_run_records_its_provenance(tmp_path):
    run = Run.open(make_run(tmp_path / "vae/demo", 0, finished=1.0).path)
    assert run.finished and run.stage == "vae" and run.facts["name"] == "demo"
    assert run.config() == {"data": {"resolution": 8}, "batch": 8}
    assert run.facts["versions"]["torch"] == torch.__version__
    assert {"started", "python", "machine", "commit"} <= run.facts.keys()
    assert sorted(path.name for path in run.path.iterdir()) == ["autoencoder", "config.yaml", "images", "run.json"]


def test_stage_2_uses_newest_finished_autoencoder_trained_on_the_same_data(tmp_path):
    make_run(tmp_path / "vae/b_old", 0, finished=1.0)
    newest = make_run(tmp_path / "vae/a_new", 1, finished=3.0)
    make_run(tmp_path / "vae/other_data", 2, finished=4.0, data="other images")
    make_run(tmp_path / "vae/running", 3, finished=None)
    make_run(tmp_path / "elsewhere/stray", 4, finished=5.0)
    model, folder = find_autoencoder(None, str(tmp_path), images())
    assert folder == str(newest.path)
    assert model.weights_sha256() == build_autoencoder(1).weights_sha256()


def test_autoencoder_is_reused_when_only_captions_or_classes_change(tmp_path):
    run = make_run(tmp_path / "vae/a", 0, finished=1.0)
    with pytest.raises(AutoencoderNotFoundError):
        find_autoencoder(None, str(tmp_path), images("with captions"))
    run.update(images_fingerprint="pixels")
    assert find_autoencoder(None, str(tmp_path), images("with captions"))[1] == str(run.path)
    with pytest.raises(AutoencoderNotFoundError):
        find_autoencoder(None, str(tmp_path), images("with captions", "one more image"))


@pytest.mark.parametrize("name", ["checkpoints", "images"])
def test_checkpoints_and_images_can_be_links_but_weights_cannot(tmp_path, name):
    """A link in place of weights could point to any file on the system."""
    run = make_run(tmp_path / "vae/a", 0, finished=1.0).path
    if (run / name).exists():
        (run / name).rmdir()
    (run / name).symlink_to(tmp_path / "scratch")
    assert Run.open(run).autoencoder().weights_sha256() == build_autoencoder(0).weights_sha256()
    (run / "autoencoder" / name).symlink_to(tmp_path / "scratch")
    with pytest.raises(UserError, match=f"autoencoder/{name} is a link to"):
        Run.open(run)


def test_runs_that_cannot_be_opened_are_skipped_with_a_warning(tmp_path, capsys):
    valid = make_run(tmp_path / "vae/valid", 0, finished=1.0)
    linked = make_run(tmp_path / "vae/linked", 1, finished=2.0)
    (linked.path / "contract.json").symlink_to("/etc/hostname")
    broken = make_run(tmp_path / "vae/broken", 2, finished=3.0)
    (broken.path / "run.json").write_text("{")
    assert find_autoencoder(None, str(tmp_path), images())[1] == str(valid.path)
    warnings = capsys.readouterr().err
    assert warnings.count("warning: ") == 2
    assert "vae/linked is ignored" in warnings and "vae/broken is ignored" in warnings


def test_missing_autoencoder_error_lists_runs_on_different_data(tmp_path):
    make_run(tmp_path / "vae/running", 3, finished=None)
    with pytest.raises(AutoencoderNotFoundError, match=r"no finished autoencoder .*vae\. .* vae="):
        find_autoencoder(None, str(tmp_path), images())
    make_run(tmp_path / "vae/other", 3, finished=1.0, data="f" * 64).update(data="cats")
    with pytest.raises(AutoencoderNotFoundError, match=r"different data: .*vae/other \(cats ffffffff\)"):
        find_autoencoder(None, str(tmp_path), images())


def test_run_that_is_being_replaced_is_never_chosen(tmp_path):
    make_run(tmp_path / "vae/x", 3, finished=1.0)
    find_autoencoder(None, str(tmp_path), images())
    (tmp_path / "vae/x").rename(tmp_path / "vae/.x.replaced")
    with pytest.raises(AutoencoderNotFoundError):
        find_autoencoder(None, str(tmp_path), images())
    with pytest.raises(UserError, match=r"overwrite=true .*earlier run.* in .*\.x\.replaced"):
        Run.open(tmp_path / "vae/x")


@pytest.mark.parametrize("layout", ["a run", "a diffusers folder", "a diffusers pipeline"])
def test_autoencoder_loads_from_run_and_diffusers_folders(tmp_path, layout):
    folder = tmp_path / "a folder"
    if layout == "a run":
        make_run(folder, 5, finished=None)
    else:
        build_autoencoder(5).model.save_pretrained(folder / "vae" if layout.endswith("pipeline") else folder)
    for model in (load_autoencoder(str(folder)), find_autoencoder(str(folder), "nowhere", images())[0]):
        assert model.weights_sha256() == weights_sha256(build_autoencoder(5).model)


def test_changed_or_missing_images_are_rejected(tmp_path, make_images):
    source = ImageFolder(make_images(tmp_path / "photos", 10, size=8))
    images = prepare(source, resolution=8, cache_dir=tmp_path / "cache", progress=False)
    run = make_run(tmp_path / "vae/demo", 0, finished=1.0, data=images.fingerprint)
    run.update(data_cache=str(images.path), val_fraction=images.val_fraction)
    assert run.image_data().fingerprint == images.fingerprint
    run.update(data_fingerprint="f" * 64)
    with pytest.raises(UserError, match="was trained on ffffffffffff"):
        run.image_data()
    (images.path / "index.json").unlink()
    with pytest.raises(UserError, match="no longer in .*data options"):
        run.image_data()
