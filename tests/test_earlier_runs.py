"""Runs that the code of an earlier layout wrote are opened, sampled and compared as ever."""

import json
import runpy
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.cli.main import construct
from ldm.cli.targets import MOVED, SAMPLER, SAMPLERS, with_current_targets
from ldm.evaluation.comparison.compare import compare_runs
from ldm.runs.run import Run
from ldm.runtime.paths import folder

EARLIER = Path(__file__).parent / "earlier_runs"


@pytest.fixture
def runs(tmp_path) -> Path:
    return Path(shutil.copytree(EARLIER, tmp_path / "runs"))


def test_the_same_pixels_are_sampled(runs, call, tmp_path):
    """Within a level: another machine's convolutions round differently."""

    def main() -> None:
        runpy.run_path(str(folder("tools") / "sample.py"), run_name="__main__")

    asked = [f"run={runs / 'diffusion'}", "num_samples=2", "label=1", "seed=5", "sampler=ddim", "sampler.steps=3"]
    ended = call(main, *asked, "device=cpu", f"out={tmp_path / 'out'}")
    assert ended.code == 0, ended
    for name in ("00000.png", "00001.png"):
        places = (tmp_path / "out", EARLIER / "samples")
        found, expected = (np.asarray(Image.open(place / name)).astype(int) for place in places)
        assert np.abs(found - expected).max() <= 1 and expected.std() > 10


def test_the_autoencoder_is_the_one_that_both_stages_name(runs):
    vae, diffusion = Run.open(runs / "vae"), Run.open(runs / "diffusion")
    assert vae.autoencoder().weights_sha256() == diffusion.facts["contract"]["autoencoder_sha256"]
    assert diffusion.pipeline().conditioning.class_names == ["cat", "dog"]


@pytest.mark.parametrize("stage", ["vae", "diffusion"])
def test_a_config_names_constructors_where_they_are_now(runs, stage):
    text, config = (runs / stage / "config.yaml").read_text(), Run.open(runs / stage).config()
    earlier = [name for name in MOVED if name in text]
    assert earlier and not any(name in json.dumps(config) for name in (*earlier, SAMPLER))
    assert config["data"]["source"]["_target_"] == "ldm.data.sources.image_folder.ImageFolder"


def test_a_group_that_has_become_flat_is_read_as_it_is_now(runs):
    """No loss beside l1 and mse in these; of a discriminator, its constructor stood in `build`."""
    config = Run.open(runs / "vae").config()
    assert config["perceptual"] is None and config["adversarial"] is None
    hinge = {"_target_": "ldm.training.adversary.Adversary", "loss": "hinge", "weight": 0.1}
    earlier = {"adversarial": {"build": hinge, "loss": "hinge", "weight": 0.1}}
    expected = hinge | {"_target_": "ldm.training.modules.adversary.Adversary"}
    assert with_current_targets(earlier) == {"adversarial": expected}


def test_a_constructor_that_moved_is_no_difference(runs):
    """Of two runs that differ in their seed alone, one is written by the present code."""
    other = Path(shutil.copytree(runs / "vae", runs / "other"))
    config = with_current_targets({**Run.open(other).config(), "seed": 1})
    (other / "config.yaml").write_text(json.dumps(config))
    facts = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**facts, "seed": 1, "name": "other"}))
    (group,) = compare_runs([str(runs / "vae"), str(other)]).groups
    assert len(group.runs) == 2, "one group: they differ in nothing but the seed"


@pytest.mark.parametrize("method", SAMPLERS)
def test_the_one_class_of_samplers_becomes_that_of_its_method(method):
    """It took eta and variance for any method, and used them for one."""
    options = {"steps": 4, "clip": 2.0, "spacing": "trailing", "eta": 0.0, "variance": None}
    sampler = construct(with_current_targets({"_target_": SAMPLER, "method": method, **options}))
    assert sampler.method == method and {**options, **asdict(sampler)} == options


def test_every_name_that_moved_leads_to_a_constructor():
    for name in (*MOVED.values(), *SAMPLERS.values()):
        module, _, attribute = name.rpartition(".")
        assert callable(getattr(__import__(module, fromlist=[attribute]), attribute)), name
