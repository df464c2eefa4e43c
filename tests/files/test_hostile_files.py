"""A corpus of hostile files, each opened through the tool's own door: refused in one paragraph, and nothing ran."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from transformers import BertConfig, BertModel, BertTokenizerFast

from ldm.autoencoder.autoencoder import Autoencoder, LatentStatistics, weights_sha256
from ldm.cli.main import as_config, construct, run
from ldm.data.images import ImageData, prepare
from ldm.data.sources.image_folder import ImageFolder
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.schedule import linear
from ldm.evaluation.samples.kept import draw_and_keep
from ldm.files.untrusted import file_name, is_plain_name
from ldm.latents.cache import open_latents
from ldm.latents.contract import LatentContract
from ldm.networks.conditioning import NoCondition
from ldm.networks.dit import DiT
from ldm.runs.run import Run
from ldm.sampling.pipeline import LatentDiffusionPipeline
from tests.files.hostile_files import CANARY, CASES

ROOT = Path(__file__).parents[2]
NUM_FILES = 68
"""Hostile files that are tried."""


def make_sound(place: Path, images: ImageData) -> None:
    """One folder of each kind, as this program leaves it."""
    torch.manual_seed(0)
    model = AutoencoderKL(block_out_channels=(8,), latent_channels=3, norm_num_groups=4).eval()
    statistics = LatentStatistics([0.0] * 3, [1.0] * 3, [0.1] * 3, images.fingerprint, weights_sha256(model))
    autoencoder = Autoencoder(model, statistics)
    contract = LatentContract(autoencoder.weights_sha256(), images.fingerprint, 8, 1, 3, 0.05, False)
    pipeline = LatentDiffusionPipeline(
        network=DiT(sample_size=8, in_channels=3, out_channels=3, hidden_dim=16, depth=1, head_dim=8).eval(),
        autoencoder=autoencoder,
        schedule=linear(20),
        prediction="v",
        conditioning=NoCondition(),
        contract=contract,
        latent_shape=(3, 8, 8),
    )
    shared = {"data_fingerprint": images.fingerprint, "data_cache": str(images.path), "val_fraction": 0.05}
    config = OmegaConf.create({"seed": 0, "name": "first", "network": {"_target_": "ldm.networks.dit.DiT"}})
    for stage in ("vae", "diffusion"):
        run = Run.create(place / stage, config, {"stage": stage, "name": "first", "figures": {}, **shared})
        run.update(finished=1.0)
        (run.path / "wandb_id.txt").write_text("abc123\n")
        (run.path / "metrics.csv").write_text("step,val/loss\n1,0.5\n")
    autoencoder.save(place / "vae" / "autoencoder")
    pipeline.save(place / "diffusion" / "pipeline")
    open_latents(lambda x: (x, x), contract, images, cache_dir=place).path.rename(place / "latents")
    draw_and_keep(pipeline, images, DDIM(2), place / "kept", num_samples=1, guidance=1.0, seed=0)
    for file in (place / "kept").glob("*.json"):
        shutil.copy(file, place / "kept/samples.json")
    (place / "encoder").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red"]
    (place / "encoder/vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab=str(place / "encoder/vocab.txt")).save_pretrained(place / "encoder")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(place / "encoder")


@pytest.fixture(scope="module")
def opened(tmp_path_factory, make_images) -> tuple[Path, list[dict]]:
    """Where all of them were opened one after the other by one process that is watched, and how each ended."""
    place = tmp_path_factory.mktemp("hostile")
    pictures = make_images(place / "sound/pictures", 6, size=8)
    (pictures / "000.txt").write_text("red\n")
    shutil.copytree(pictures, place / "pictures")
    images = prepare(ImageFolder(pictures), resolution=8, cache_dir=place / "sound", progress=False)
    make_sound(place / "sound", images)
    shutil.copytree(images.path, place / "sound/cache")
    for number, case in enumerate(CASES):
        shutil.copytree(place / "sound" / case.base, place / f"{number:03d}")
        case.make(place / f"{number:03d}", place / f"{CANARY}-{number}")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(place),
        "LDM_CACHE": str(place / "cache"),
        "TMPDIR": str(place),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.files.hostile_files", str(place)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return place, [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]


def test_every_file_is_opened(opened):
    assert [found["name"] for found in opened[1]] == [*(case.name for case in CASES), "control"]
    assert len(CASES) == NUM_FILES == len({case.name for case in CASES})


@pytest.mark.parametrize("number", range(NUM_FILES), ids=[case.name for case in CASES])
def test_it_is_refused_in_a_paragraph(opened, number):
    case, found = CASES[number], opened[1][number]
    if case.said is None:
        assert found["kind"] == "opened", found
        return
    assert found["kind"] in ("UserError", "InputError"), found
    assert case.said in found["message"] and "\n" not in found["message"] and len(found["message"]) < 1000, found


def test_nothing_ran(opened):
    """No program, no code of theirs, no connection, no unpickling, no write outside: the audit hook saw none."""
    place, (*tried, control) = opened
    assert not [found for found in tried if found["seen"]]
    assert [canary.name for canary in place.glob(f"{CANARY}*")] == [f"{CANARY}-control"]
    assert [event.partition("(")[0] for event in control["seen"]] == ["pickle.find_class", "os.system"], (
        "it would be seen"
    )


SPLIT = """
d: $
e: '{oc.create:{_target_: torch.load, f: evil.pt}}'
network: ${d}${e}
sampler: {a: ["${d}{oc.env:HOME}"]}
"""


def test_text_is_interpolated_once(monkeypatch, tmp_path):
    """Values are resolved once: a text that then reads as an interpolation, typed or put together, stays text."""
    checked = OmegaConf.to_container(OmegaConf.create(SPLIT), resolve=True)
    config = as_config(checked)
    assert OmegaConf.to_container(config, resolve=True) == checked
    assert config.network == construct(config).get("network") == "${oc.create:{_target_: torch.load, f: evil.pt}}"
    assert construct(config.sampler) == {"a": ["${oc.env:HOME}"]}
    seen = []
    mine = tmp_path / "${seed}"
    mine.mkdir()
    (mine / "a.png").touch()
    typed = ["stage=vae", "data=image_folder", f"data.path={mine}", "name=${oc.env:HOME}"]
    monkeypatch.setattr("sys.argv", ["train", *typed])
    run("train", lambda config: seen.append((config.name, construct(config.data.source).path)))
    assert seen == [("${oc.env:HOME}", mine)]


@given(st.text("\\${}a:.'\" \n", max_size=12))
@settings(max_examples=200, derandomize=True, database=None, deadline=None)
def test_every_text_is_read_as_it_is(text):
    config = as_config({"a": [text], "b": 1})
    assert config.a[0] == text and construct(config) == {"a": [text], "b": 1}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("../../etc/passwd", "-..-etc-passwd"),
        ("a\0b\nc", "a-b-c"),
        ("..", "-"),
        ("woman’s hat 🅰️", "woman’s hat 🅰️"),
        ("\ud800x", "-x"),
        ("é" * 100, "é" * 50),
    ],
)
def test_a_text_becomes_a_name(text, name):
    assert file_name(text) == name and is_plain_name(file_name(text))
