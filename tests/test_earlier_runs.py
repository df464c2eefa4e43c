"""Runs from earlier versions of the code can still be opened, sampled from and compared."""

import json
import runpy
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.cli.main import construct
from ldm.cli.targets import MOVED_TARGETS, SAMPLER, SAMPLERS, update_targets
from ldm.evaluation.comparison.compare import compare_runs
from ldm.runs.run import Run
from ldm.runtime.paths import bundled_folder

EARLIER = Path(__file__).parent / "earlier_runs"


@pytest.fixture
def runs(tmp_path) -> Path:
    return Path(shutil.copytree(EARLIER, tmp_path / "runs"))


def test_earlier_run_generates_the_same_samples(runs, call, tmp_path):
    """Pixels agree within one of 255 levels, because rounding in convolutions depends on the machine."""

    def main() -> None:
        runpy.run_path(str(bundled_folder("tools") / "sample.py"), run_name="__main__")

    options = [f"run={runs / 'diffusion'}", "num_samples=2", "label=1", "seed=5", "sampler=ddim", "sampler.steps=3"]
    result = call(main, *options, "device=cpu", f"out={tmp_path / 'out'}")
    assert result.code == 0, result
    for name in ("00000.png", "00001.png"):
        folders = (tmp_path / "out", EARLIER / "samples")
        actual, expected = (np.asarray(Image.open(folder / name)).astype(int) for folder in folders)
        assert np.abs(actual - expected).max() <= 1 and expected.std() > 10


def test_both_stages_use_the_same_autoencoder(runs):
    vae, diffusion = Run.open(runs / "vae"), Run.open(runs / "diffusion")
    assert vae.autoencoder().weights_sha256() == diffusion.facts["contract"]["autoencoder_sha256"]
    assert diffusion.pipeline().conditioning.class_names == ["cat", "dog"]


@pytest.mark.parametrize("stage", ["vae", "diffusion"])
def test_moved_targets_in_config_are_updated(runs, stage):
    text, config = (runs / stage / "config.yaml").read_text(), Run.open(runs / stage).config()
    old_targets = [name for name in MOVED_TARGETS if name in text]
    assert old_targets and not any(name in json.dumps(config) for name in (*old_targets, SAMPLER))
    assert config["data"]["source"]["_target_"] == "ldm.data.sources.image_folder.ImageFolder"


def test_nested_groups_of_earlier_versions_are_flattened(runs):
    """Earlier versions nested the discriminator's constructor under `build`. A null group stays null."""
    config = Run.open(runs / "vae").config()
    assert config["perceptual"] is None and config["adversarial"] is None
    hinge = {"_target_": "ldm.training.adversary.Adversary", "loss": "hinge", "weight": 0.1}
    nested = {"adversarial": {"build": hinge, "loss": "hinge", "weight": 0.1}}
    expected = hinge | {"_target_": "ldm.training.modules.adversary.Adversary"}
    assert update_targets(nested) == {"adversarial": expected}


def test_moved_targets_are_not_compared(runs):
    """Runs that differ only in their seed form one group, even if only one of the runs has current targets."""
    updated = Path(shutil.copytree(runs / "vae", runs / "updated"))
    config = update_targets({**Run.open(updated).config(), "seed": 1})
    (updated / "config.yaml").write_text(json.dumps(config))
    facts = json.loads((updated / "run.json").read_text())
    (updated / "run.json").write_text(json.dumps({**facts, "seed": 1, "name": "updated"}))
    (group,) = compare_runs([str(runs / "vae"), str(updated)]).groups
    assert len(group.runs) == 2, "runs that differ only in their seed form one group"


@pytest.mark.parametrize("method", SAMPLERS)
def test_earlier_sampler_class_is_replaced_by_specific_class(method):
    """The earlier class accepted eta and variance for every method, although each applies to only one method."""
    options = {"steps": 4, "clip": 2.0, "spacing": "trailing", "eta": 0.0, "variance": None}
    sampler = construct(update_targets({"_target_": SAMPLER, "method": method, **options}))
    assert sampler.method == method and {**options, **asdict(sampler)} == options


def test_moved_targets_can_be_imported():
    for name in (*MOVED_TARGETS.values(), *SAMPLERS.values()):
        module, _, attribute = name.rpartition(".")
        assert callable(getattr(__import__(module, fromlist=[attribute]), attribute)), name
