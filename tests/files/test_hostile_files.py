"""Hostile files are rejected with a one-line message, and the code in a hostile file does not run."""

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
from ldm.evaluation.samples.cache import draw_cached
from ldm.files.untrusted import is_plain_name, to_file_name
from ldm.latents.cache import open_latents
from ldm.latents.contract import LatentContract
from ldm.networks.conditioning import NoCondition
from ldm.networks.dit import DiT
from ldm.runs.run import Run
from ldm.sampling.pipeline import LatentDiffusion
from tests.files.hostile_files import CANARY, CASES

ROOT = Path(__file__).parents[2]
NUM_CASES = 74


def make_valid_folders(root: Path, images: ImageData) -> None:
    """Create one valid folder of each kind that ldm writes."""
    torch.manual_seed(0)
    model = AutoencoderKL(block_out_channels=(8,), latent_channels=3, norm_num_groups=4).eval()
    statistics = LatentStatistics([0.0] * 3, [1.0] * 3, [0.1] * 3, images.fingerprint, weights_sha256(model))
    autoencoder = Autoencoder(model, statistics)
    contract = LatentContract(autoencoder.weights_sha256(), images.fingerprint, 8, 1, 3, 0.05, False)
    pipeline = LatentDiffusion(
        network=DiT(sample_size=8, in_channels=3, out_channels=3, hidden_dim=16, depth=1, head_dim=8).eval(),
        autoencoder=autoencoder,
        schedule=linear(20),
        prediction="v",
        conditioning=NoCondition(),
        contract=contract,
        latent_shape=(3, 8, 8),
    )
    facts = {"data_fingerprint": images.fingerprint, "data_cache": str(images.path), "val_fraction": 0.05}
    config = OmegaConf.create({"seed": 0, "name": "first", "network": {"_target_": "ldm.networks.dit.DiT"}})
    for stage in ("vae", "diffusion"):
        run = Run.create(root / stage, config, {"stage": stage, "name": "first", "figures": {}, **facts})
        run.update(finished=1.0)
        (run.path / "wandb_id.txt").write_text("abc123\n")
        (run.path / "metrics.csv").write_text("step,val/loss\n1,0.5\n")
    autoencoder.save(root / "vae" / "autoencoder")
    pipeline.save(root / "diffusion" / "pipeline")
    open_latents(lambda x: (x, x), contract, images, cache_dir=root).path.rename(root / "latents")
    draw_cached(pipeline, images, DDIM(2), root / "samples", num_samples=1, guidance=1.0, seed=0)
    for file in (root / "samples").glob("*.json"):
        shutil.copy(file, root / "samples/samples.json")
    (root / "encoder").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red"]
    (root / "encoder/vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab=str(root / "encoder/vocab.txt")).save_pretrained(root / "encoder")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(root / "encoder")


@pytest.fixture(scope="module")
def audit_results(tmp_path_factory, make_images) -> tuple[Path, list[dict]]:
    """Open all hostile files in one audited process. Return the working folder and the outcome for each file."""
    root = tmp_path_factory.mktemp("hostile")
    photos = make_images(root / "valid/photos", 6, size=8)
    (photos / "000.txt").write_text("red\n")
    shutil.copytree(photos, root / "photos")
    images = prepare(ImageFolder(photos), resolution=8, cache_dir=root / "valid", progress=False)
    make_valid_folders(root / "valid", images)
    shutil.copytree(images.path, root / "valid/cache")
    for number, case in enumerate(CASES):
        shutil.copytree(root / "valid" / case.base, root / f"{number:03d}")
        case.mutate(root / f"{number:03d}", root / f"{CANARY}-{number}")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(root),
        "LDM_CACHE": str(root / "cache"),
        "TMPDIR": str(root),
    }
    process = subprocess.run(
        [sys.executable, "-m", "tests.files.hostile_files", str(root)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return root, [json.loads(line) for line in process.stdout.splitlines() if line.startswith('{"name"')]


def test_every_hostile_file_is_opened(audit_results):
    assert [outcome["name"] for outcome in audit_results[1]] == [*(case.name for case in CASES), "control"]
    assert len(CASES) == NUM_CASES == len({case.name for case in CASES})


@pytest.mark.parametrize("number", range(NUM_CASES), ids=[case.name for case in CASES])
def test_hostile_file_is_rejected_with_a_one_line_message(audit_results, number):
    case, outcome = CASES[number], audit_results[1][number]
    if case.message is None:
        assert outcome["kind"] == "opened", outcome
        return
    message = outcome["message"]
    assert outcome["kind"] in ("UserError", "InputError"), outcome
    assert case.message in message and "\n" not in message and len(message) < 1000, outcome


def test_no_hostile_code_ran(audit_results):
    """The audit hook recorded no subprocess, foreign code, connection, unpickling or write outside the folder."""
    root, (*outcomes, control) = audit_results
    assert not [outcome for outcome in outcomes if outcome["events"]]
    assert [canary.name for canary in root.glob(f"{CANARY}*")] == [f"{CANARY}-control"]
    events = [event.partition("(")[0] for event in control["events"]]
    assert events == ["pickle.find_class", "os.system"], "the audit hook detects the control"


NESTED_INTERPOLATIONS = """
d: $
e: '{oc.create:{_target_: torch.load, f: evil.pt}}'
network: ${d}${e}
sampler: {a: ["${d}{oc.env:HOME}"]}
"""


def test_values_are_interpolated_only_once(monkeypatch, tmp_path):
    """A resolved value that looks like an interpolation is not resolved again."""
    resolved = OmegaConf.to_container(OmegaConf.create(NESTED_INTERPOLATIONS), resolve=True)
    config = as_config(resolved)
    assert OmegaConf.to_container(config, resolve=True) == resolved
    assert config.network == construct(config).get("network") == "${oc.create:{_target_: torch.load, f: evil.pt}}"
    assert construct(config.sampler) == {"a": ["${oc.env:HOME}"]}
    values = []
    folder = tmp_path / "${seed}"
    folder.mkdir()
    (folder / "a.png").touch()
    options = ["stage=vae", "data=image_folder", f"data.path={folder}", "name=${oc.env:HOME}"]
    monkeypatch.setattr("sys.argv", ["train", *options])
    run("train", lambda config: values.append((config.name, construct(config.data.source).path)))
    assert values == [("${oc.env:HOME}", folder)]


@given(st.text("\\${}a:.'\" \n", max_size=12))
@settings(max_examples=200, derandomize=True, database=None, deadline=None)
def test_config_text_is_read_literally(text):
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
def test_text_is_converted_to_file_name(text, name):
    assert to_file_name(text) == name and is_plain_name(to_file_name(text))
