"""ldm.runs.run: a run folder says what it is; the autoencoder that a second stage finds."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from omegaconf import OmegaConf

from ldm.autoencoder.autoencoder import Autoencoder, weights_sha256
from ldm.data.images import prepare
from ldm.data.sources.image_folder import ImageFolder
from ldm.errors import UserError
from ldm.runs.load import find_autoencoder, load_autoencoder
from ldm.runs.run import NoAutoencoder, Run


def autoencoder(seed: int) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(AutoencoderKL(block_out_channels=(8,), latent_channels=3, norm_num_groups=4).eval())


def make_run(folder: Path, seed: int, *, finished: float | None, data: str = "images") -> Run:
    """A run of stage vae, of untrained weights."""
    config = OmegaConf.create({"data": {"resolution": 8}, "batch": "${data.resolution}"})
    run = Run.create(folder, config, {"stage": "vae", "name": folder.name, "data_fingerprint": data})
    autoencoder(seed).save(run.autoencoder_folder)
    run.update(finished=finished)
    return run


def test_a_run_says_where_it_comes_from(tmp_path):
    run = Run.open(make_run(tmp_path / "vae/demo", 0, finished=1.0).path)
    assert run.finished and run.stage == "vae" and run.facts["name"] == "demo"
    assert run.config() == {"data": {"resolution": 8}, "batch": 8}
    assert run.facts["versions"]["torch"] == torch.__version__
    assert {"started", "python", "machine", "commit"} <= run.facts.keys()
    assert sorted(path.name for path in run.path.iterdir()) == ["autoencoder", "config.yaml", "images", "run.json"]


def test_the_newest_finished_run_on_the_same_data_is_found(tmp_path):
    make_run(tmp_path / "vae/b_old", 0, finished=1.0)
    newest = make_run(tmp_path / "vae/a_new", 1, finished=3.0)
    make_run(tmp_path / "vae/other_data", 2, finished=4.0, data="other images")
    make_run(tmp_path / "vae/running", 3, finished=None)
    make_run(tmp_path / "elsewhere/stray", 4, finished=5.0)
    found, place = find_autoencoder(None, str(tmp_path), "images")
    assert place == str(newest.path)
    assert found.weights_sha256() == autoencoder(1).weights_sha256()


@pytest.mark.parametrize("name", ["checkpoints", "images"])
def test_checkpoints_may_lie_on_another_disk(tmp_path, name):
    """Weights for use may not: they would be another file's."""
    run = make_run(tmp_path / "vae/a", 0, finished=1.0).path
    if (run / name).exists():
        (run / name).rmdir()
    (run / name).symlink_to(tmp_path / "scratch")
    assert Run.open(run).autoencoder().weights_sha256() == autoencoder(0).weights_sha256()
    (run / "autoencoder" / name).symlink_to(tmp_path / "scratch")
    with pytest.raises(UserError, match=f"autoencoder/{name} is a link to"):
        Run.open(run)


def test_a_bad_folder_keeps_nobody_from_another_run(tmp_path, capsys):
    found = make_run(tmp_path / "vae/good", 0, finished=1.0)
    linked = make_run(tmp_path / "vae/linked", 1, finished=2.0)
    (linked.path / "contract.json").symlink_to("/etc/hostname")
    broken = make_run(tmp_path / "vae/broken", 2, finished=3.0)
    (broken.path / "run.json").write_text("{")
    assert find_autoencoder(None, str(tmp_path), "images")[1] == str(found.path)
    said = capsys.readouterr().err
    assert said.count("warning: ") == 2 and "vae/linked is left out of" in said and "vae/broken is left out of" in said


def test_nothing_to_find_names_those_on_other_data(tmp_path):
    make_run(tmp_path / "vae/running", 3, finished=None)
    with pytest.raises(NoAutoencoder, match=r"no finished autoencoder for this data in .*vae\. Name one with vae="):
        find_autoencoder(None, str(tmp_path), "images")
    make_run(tmp_path / "vae/other", 3, finished=1.0, data="f" * 64).update(data="cats")
    with pytest.raises(NoAutoencoder, match=r"only on other data: .*vae/other \(cats ffffffff\)"):
        find_autoencoder(None, str(tmp_path), "images")


def test_a_run_that_is_being_replaced_is_never_chosen(tmp_path):
    make_run(tmp_path / "vae/x", 3, finished=1.0)
    find_autoencoder(None, str(tmp_path), "images")
    (tmp_path / "vae/x").rename(tmp_path / "vae/.x.replaced")
    with pytest.raises(NoAutoencoder):
        find_autoencoder(None, str(tmp_path), "images")
    with pytest.raises(UserError, match=r"earlier run, .* is in .*\.x\.replaced"):
        Run.open(tmp_path / "vae/x")


@pytest.mark.parametrize("layout", ["a run", "a diffusers folder", "a diffusers pipeline"])
def test_an_autoencoder_comes_from_any_of_three_folders(tmp_path, layout):
    place = tmp_path / "a place"
    if layout == "a run":
        make_run(place, 5, finished=None)
    else:
        autoencoder(5).model.save_pretrained(place / "vae" if layout.endswith("pipeline") else place)
    for found in (load_autoencoder(str(place)), find_autoencoder(str(place), "nowhere", "any")[0]):
        assert found.weights_sha256() == weights_sha256(autoencoder(5).model)


def test_images_that_changed_or_went_are_named(tmp_path, make_images):
    source = ImageFolder(make_images(tmp_path / "pictures", 10, size=8))
    images = prepare(source, resolution=8, cache_dir=tmp_path / "cache", progress=False)
    run = make_run(tmp_path / "vae/demo", 0, finished=1.0, data=images.fingerprint)
    run.update(data_cache=str(images.path), val_fraction=images.val_fraction)
    assert run.image_data().fingerprint == images.fingerprint
    run.update(data_fingerprint="f" * 64)
    with pytest.raises(UserError, match="but .* was trained on ffffffffffff"):
        run.image_data()
    (images.path / "index.json").unlink()
    with pytest.raises(UserError, match="are no longer in .*Prepare them again"):
        run.image_data()
