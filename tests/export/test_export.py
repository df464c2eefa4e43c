"""Tests of tools/export.py on a small run of an earlier version, and of uploads to a stand-in for the Hub."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

import ldm.cli.main
import ldm.commands.export
from ldm.diffusion.samplers.multistep import DPMSolver
from ldm.export.model_card import without_absolute_path
from ldm.runs.lineage import run_weights_sha256
from ldm.runs.load import load_pipeline
from ldm.runs.run import Run
from ldm.sampling.draw import draw_images
from ldm.sampling.pipeline import FORMAT, LatentDiffusion
from tests.export.hub_stand_in import hub_stand_in

EARLIER = Path(__file__).parents[1] / "earlier_runs"


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    for stage in ("vae", "diffusion"):
        shutil.copytree(EARLIER / stage, tmp_path / "runs" / stage / "demo")
    monkeypatch.chdir(tmp_path)
    return Run.open("runs/diffusion/demo")


@pytest.fixture
def export(call):
    """Function that runs tools/export.py in this process."""

    def main() -> None:
        ldm.cli.main.run("export", ldm.commands.export.export)

    return lambda *options: call(main, *options)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_stand_in() as hub:
        hub.use(monkeypatch, tmp_path / "hub")
        yield hub


def test_earlier_pipelines_are_rewritten(run, export):
    before = json.loads((run.pipeline_folder / "model_index.json").read_text())
    assert before["format"] < FORMAT
    result = export("run=runs/diffusion/demo", "out=exported")
    assert result.code == 0, result
    index = json.loads(Path("exported/model_index.json").read_text())
    assert index["settings"]["format"] == FORMAT and index["_class_name"][1] == "LatentDiffusionPipeline"
    images = [
        draw_images(LatentDiffusion.load(path), labels=[0, 1]) for path in (run.pipeline_folder, Path("exported"))
    ]
    assert [image.tobytes() for image in images[0]] == [image.tobytes() for image in images[1]]
    again = export("run=runs/diffusion/demo", "out=exported")
    assert again.code == 2 and "out=exported already exists" in again.err


def test_card_describes_the_run(run, export):
    evaluation = {"weights_sha256": run_weights_sha256(run), "features": "efficientnet_lite", "num_samples": 512}
    evaluation |= {"num_reference": 900, "reference": "pets/train", "sampler": {"method": "ddim", "steps": 20}}
    evaluation |= {
        "guidance": 2.0,
        "class_accuracy_samples": 0.9,
        "kd_samples": 0.05,
        "kd_samples_standard_error": 0.002,
        "fd_samples": None,
    }
    run.evaluation_file.write_text(json.dumps(evaluation))
    accounting = {"licence": "OpenMoji 17.0 (CC BY-SA 4.0, openmoji.org)", "train": 900, "validation": 50}
    private = str(Path("/home/someone/pictures").absolute())
    run.update(accounting=accounting, options=["stage=diffusion", f"data.path={private}"], vae="runs/vae/demo")
    run.images.mkdir()
    Image.new("RGB", (8, 8)).save(run.images / "samples_final.png")
    assert export("run=runs/diffusion/demo", "out=exported").code == 0
    card = ModelCard.load("exported/README.md", ignore_metadata_errors=False)
    assert card.data.license == "cc-by-sa-4.0" and card.data.library_name == "diffusers"
    result, accuracy = card.data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value) == ("class_accuracy_samples", 0.9)
    assert (result.metric_type, result.metric_value, result.metric_args["standard_error"]) == (
        "kd_samples",
        0.05,
        0.002,
    )
    for text in ("| KD | 0.05 +- 0.002 |", "512 samples by ddim in 20 steps", "900 images of pets/train"):
        assert text in card.text
    for text in ("openmoji.org", "data.path=pictures", str(run.facts["commit"]), "torch", "samples.png"):
        assert text in card.text
    texts = [path.read_text() for path in Path("exported").rglob("*") if path.suffix in (".md", ".json", ".py")]
    assert not any(private in text or str(Path.cwd()) in text for text in texts)
    run.evaluation_file.write_text(json.dumps({**evaluation, "weights_sha256": "0" * 64}))
    assert export("run=runs/diffusion/demo", "out=stale", "license=mit").code == 0
    card = ModelCard.load("stale/README.md")
    assert card.data.eval_results is None and card.data.license == "mit"
    assert "No metrics have been measured for these weights" in card.text


def test_uploaded_pipeline_opens_by_its_id(run, export, hub, tmp_path):
    result = export("run=runs/diffusion/demo", "out=exported", "push=someone/demo")
    assert result.code == 0 and f"uploaded to {hub.address}/someone/demo" in result.out, result
    assert hub.visibility["someone/demo"] == "private"
    exported = {path.relative_to("exported").as_posix() for path in Path("exported").rglob("*") if path.is_file()}
    assert hub.files["someone/demo"].keys() == exported
    assert not any(part in name for name in exported for part in ("checkpoint", "wandb", "images/", "metrics.csv"))
    card = hub.files["someone/demo"]["README.md"].decode()
    assert 'from_pretrained("someone/demo", trust_remote_code=True)' in card
    code = card.partition("```python\n")[2].partition("```")[0]
    environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    program = "import sys; sys.modules['ldm'] = None\n" + code.replace("manual_seed(0)", "manual_seed(3_000_009)")
    subprocess.run([sys.executable, "-c", program], env={**os.environ, **environment}, check=True)
    config = run.config()
    sampler = DPMSolver(config["sampler"]["steps"])
    options = {"labels": [0], "seed": 3, "guidance": config["conditioning"]["guidance"], "sampler": sampler}
    (expected,) = draw_images(load_pipeline("someone/demo"), **options)
    with Image.open("image.png") as image:
        assert max(abs(a - b) for a, b in zip(image.tobytes(), expected.tobytes(), strict=True)) <= 1


def test_upload_problems_are_explained(run, export, hub, monkeypatch):
    options = ("run=runs/diffusion/demo", "out=exported")
    assert "push=demo must be OWNER/NAME" in export(*options, "push=demo").err
    assert "push=a/b/c must be OWNER/NAME" in export(*options, "push=a/b/c").err
    monkeypatch.setattr("ldm.export.hub.get_token", lambda: None)
    result = export(*options, "push=someone/demo")
    assert result.code == 2 and "hf auth login" in result.err and not Path("exported").exists()
    monkeypatch.setattr("ldm.export.hub.get_token", lambda: "hf_stand_in")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    result = export(*options, "push=someone/demo")
    assert result.code == 2 and "The upload to push=someone/demo failed" in result.err, result
    shutil.rmtree("exported")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    hub.files["someone/public"], hub.visibility["someone/public"] = {}, "public"
    result = export(*options, "push=someone/public")
    assert result.code == 2 and "public already" in result.err and not hub.files["someone/public"], result
    shutil.rmtree("exported")
    hub.may_write = False
    result = export(*options, "push=someone/demo")
    assert result.code == 2 and "hf upload someone/demo exported" in result.err and Path("exported/README.md").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["format=stock"], "StableDiffusionPipeline.*network=unet_sd conditioning=clip_sd.*format=native"),
        (["format=onnx"], "format=onnx must be 'native' or 'stock'"),
        (["text_encoder=hub"], "text_encoder=hub needs"),
        (["run=runs/vae/demo"], "a diffusion run is needed"),
        (["run=nowhere"], "run=nowhere does not exist"),
    ],
)
def test_refusals_name_the_remedy(run, export, options, message):
    result = export("run=runs/diffusion/demo", "out=exported", *options)
    assert result.code == 2 and re.search(message, result.err), result
    assert not Path("exported").exists()


def test_absolute_paths_are_shortened():
    values = ["data.path=/home/a/pets", "~/pets", r"data.path=C:\pets\cats", "lr=1e-3", "runs/vae/demo"]
    assert without_absolute_path(values) == ["data.path=pets", "pets", "data.path=cats", "lr=1e-3", "runs/vae/demo"]
    assert without_absolute_path({"a": ["/b/c"], "d": 1}) == {"a": ["c"], "d": 1}
