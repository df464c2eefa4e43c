"""ldm.tracking.run: W&B without prompts, a single record for a resumed run, and lineage."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import wandb
from PIL import Image

import ldm.tracking.server
from ldm.errors import UserError
from ldm.latents.contract import LatentContract
from ldm.runs.lineage import inputs, outputs, run_weights_sha256
from ldm.runs.run import Run
from ldm.tracking.artifact import Artifact, flatten, sha256
from ldm.tracking.run import OPTIONS, WandbRun, read_run_id, track_report
from ldm.tracking.server import choose_mode, has_key
from ldm.training.callbacks.loggers import make_loggers


class Recorder:
    """A stand-in for the run object of W&B."""

    def __init__(self, **options) -> None:
        self.options, self.id = options, options["id"]
        self.config, self.step, self.settings = {}, 0, SimpleNamespace(sync_dir="record")

    def define_metric(self, name, step_metric) -> None: ...

    def log(self, values, **options) -> None: ...


def start(folder, **options) -> WandbRun:
    return WandbRun(folder, {"a": {"b": 1}}, name="vae/demo", mode="offline", **options)


def test_configs_are_flattened_to_plain_types():
    """Types that JSON lacks become text, and mappings in a list are numbered."""
    nested = {
        "a": {"b": {"c": [2]}, "d": None},
        "path": Path("a/b"),
        "sizes": (1, np.float32(0.5)),
        "parts": [{"name": "x"}, {"name": np.int64(2)}],
    }
    flat = {"a.b.c": [2], "a.d": None, "path": "a/b", "sizes": [1, 0.5], "parts.0.name": "x", "parts.1.name": 2}
    assert flatten(nested) == flat == json.loads(json.dumps(flatten(nested)))


@pytest.mark.parametrize(
    ("requested", "environment", "key", "mode"),
    [
        ("disabled", "online", True, "disabled"),
        (None, "offline", True, "offline"),
        (None, "", True, "online"),
        (None, "", False, "offline"),
    ],
)
def test_default_mode_is_online_only_with_an_api_key(monkeypatch, requested, environment, key, mode):
    monkeypatch.setenv("WANDB_MODE", environment)
    monkeypatch.setattr(ldm.tracking.server, "has_key", lambda: key)
    assert choose_mode(requested) == mode
    monkeypatch.setenv("WANDB_MODE", "shared")
    with pytest.raises(UserError, match="WANDB_MODE=shared is unknown.*online, offline, disabled"):
        choose_mode(None)


def test_api_key_is_found_without_contacting_the_server(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()
    assert not has_key()
    (tmp_path / "netrc").write_text("machine 127.0.0.1:9 login user password " + "0" * 40)
    assert has_key()
    wandb.teardown()


def test_resumed_run_keeps_its_id_and_a_new_run_gets_a_new_one(monkeypatch, tmp_path):
    """This includes the id from a W&B sweep agent, whose server creates the run. It is also kept after an outage."""
    ids = iter(["of-the-agent"])
    monkeypatch.setattr(wandb, "init", lambda **options: Recorder(**{**options, "id": next(ids, options["id"])}))
    first = start(tmp_path)
    assert (tmp_path / "wandb_id.txt").read_text() == "of-the-agent\n"
    assert read_run_id(tmp_path) == start(tmp_path, resume=True).run.options["id"] == "of-the-agent"
    assert start(tmp_path).run.id != "of-the-agent"
    first.mode, first.run.log = "online", None
    first.log({"loss": 1.0}, 0)
    assert first.mode == "offline" and first.run.options["id"] == "of-the-agent"
    assert read_run_id(tmp_path / "nothing") is None


class Record:
    """Content of the folder of an offline run, as read by W&B's command line."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
        self.entries = [json.loads(line) for line in done.stdout.splitlines()]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return all entries of a type."""
        return [entry[kind] for entry in self.entries if entry["type"] == kind]

    @property
    def config(self) -> dict[str, Any]:
        updates = [update for part in (*self.of("run"), *self.of("config")) for update in [part.get("config", part)]]
        return {key: value for update in updates for key, value in update.get("update", {}).items()}

    @property
    def summary(self) -> dict[str, Any]:
        return {key: value for part in self.of("summary") for key, value in part["update"].items()}

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [history["item"] for history in self.of("history")]

    @property
    def artifacts(self) -> dict[str, tuple[dict[str, Any], list[str]]]:
        """Metadata and file names by the artifact's name."""
        return {
            item["name"]: (json.loads(item["metadata"]), [file["path"] for file in item["manifest"]["contents"]])
            for item in self.of("artifact")
            if item["type"] != "run_table"  # created by W&B itself for a table
        }


def records(folder: Path) -> list[Record]:
    return [Record(path) for path in sorted((folder / "wandb").glob("offline-run-*"))]


CONTRACT = LatentContract("a" * 64, "d" * 64, resolution=16, factor=4, channels=12, val_fraction=0.1, flip=False)
SHARED = {"format": 1, "data": "pets", "data_fingerprint": "d" * 64, "val_fraction": 0.1, "finished": 1.0}


def make_run(folder: Path, stage: str, **facts: Any) -> Run:
    """Create the folder of a finished run, with text instead of weights."""
    weights = {"vae": ["autoencoder"], "diffusion": ["pipeline/network", "pipeline/vae"]}[stage]
    for part in weights:
        (folder / part).mkdir(parents=True)
        (folder / part / "diffusion_pytorch_model.safetensors").write_bytes(b"weights of " + part.encode())
    CONTRACT.save(folder if stage == "vae" else folder / "pipeline")
    (folder / "config.yaml").write_text("data: {cache_dir: null}\n")
    run = Run(folder, {**SHARED, "stage": stage, "name": folder.name, **facts})
    run.save()
    return run


def options(**overrides: Any) -> dict[str, Any]:
    settings = dict.fromkeys(OPTIONS) | {"project": "ldm", "tags": ["a tag"], "mode": "offline"}
    limits = {"timeout_s": 10, "finish_timeout_s": 10, "max_artifact_mb": 1, "upload_latents": False}
    return {"wandb": True, **settings, **limits, **overrides}


def log_outcome(run: Run, **overrides: Any) -> Record:
    loggers = make_loggers(options(**overrides), run, resume=False)
    loggers.wandb.log({"train/loss": 0.5}, 10)
    Image.new("RGB", (4, 4)).save(run.path / "samples_final.png")
    loggers.log_outcome(run, {"steps": 10, "psnr_db": 20.0}, run.path / "samples_final.png")
    return records(run.path)[-1]


def test_offline_record_contains_metrics_config_images_and_artifacts(tmp_path):
    run = make_run(tmp_path / "first", "vae", commit="c0ffee", versions={"torch": "2"})
    record = log_outcome(run)
    loss, image = record.rows
    assert loss["train/loss"] == 0.5 and loss["step"] == 10
    assert image["samples_final._type"] == "images/separated"
    assert image["samples_final.captions"] == ["samples_final"]
    files = [file["path"] for part in record.of("files") for file in part["files"]]
    assert any(file.startswith("media/images/samples_final") for file in files)
    config = record.config
    assert (config["run.commit"], config["run.versions.torch"], config["inputs.data-pets"]) == ("c0ffee", "2", "d" * 64)
    assert record.summary["psnr_db"] == 20.0 and record.summary["steps"] == 10
    (header,) = record.of("run")
    assert header["tags"] == ["a tag"] and header["run_group"] == "first" and header["job_type"] == "vae"
    metadata, files = record.artifacts["autoencoder-first"]
    assert (metadata["weights_sha256"], metadata["data_fingerprint"], metadata["factor"]) == ("a" * 64, "d" * 64, 4)
    assert set(files) == {"autoencoder-first.json", "contract.json", "diffusion_pytorch_model.safetensors"}
    metadata, files = record.artifacts[f"latents-{CONTRACT.key}"]
    assert metadata["autoencoder_sha256"] == "a" * 64 and len(files) == 1, "cached latents are not uploaded"
    assert "data-pets" not in record.artifacts, "images are not uploaded"


def test_lineage_is_recorded_from_data_to_evaluation(tmp_path):
    vae = make_run(tmp_path / "vae/first", "vae")
    stage_1 = log_outcome(vae).artifacts
    diffusion = make_run(tmp_path / "diffusion/second", "diffusion", vae=str(vae.path), chain_sha256="c" * 64)
    training = log_outcome(diffusion)
    pipeline, _ = training.artifacts["pipeline-second"]
    from_stage_1 = {label: stage_1[label][0]["sha256"] for label in ("autoencoder-first", f"latents-{CONTRACT.key}")}
    assert pipeline["inputs"] == {"data-pets": "d" * 64, **from_stage_1}
    weights = diffusion.path / "pipeline/network/diffusion_pytorch_model.safetensors"
    assert pipeline["weights_sha256"] == sha256([weights])
    report = diffusion.path / "evaluation.json"
    report.write_text("{}")
    track_report(
        diffusion.path / "evaluation",
        {"logger": options()},
        name="evaluation/diffusion/second",
        values={"fid": 3.0, "sampler": {"steps": 5}, "interval": [0.0, 1.0], "closest": [{"sample": 1}], "no": None},
        figures={},
        tables={"sweep": (["steps", "fd"], [[5, 1.5], [10, 1.25]])},
        inputs=outputs(diffusion)[:1],
        files=[report],
    )
    (record,) = records(diffusion.path / "evaluation")
    metadata, files = record.artifacts["evaluation-diffusion-second"]
    assert metadata["pipeline_sha256"] == pipeline["weights_sha256"] and metadata["fid"] == 3.0
    assert metadata["inputs"] == {"pipeline-second": pipeline["weights_sha256"]} and "evaluation.json" in files
    summary = record.summary
    assert (summary["fid"], summary["sampler.steps"], summary["interval"]) == (3.0, 5, [0.0, 1.0])
    assert not any(key.startswith(("closest", "no")) for key in summary)
    (row,) = record.rows
    assert row["sweep._type"] == "table-file" and row["sweep.nrows"] == 2
    pretrained = make_run(tmp_path / "third", "diffusion", vae="stabilityai/sd-vae-ft-mse")
    assert inputs(pretrained)[1].label == "autoencoder-stabilityai-sd-vae-ft-mse"
    assert training.summary["pipeline_sha256"] == pipeline["weights_sha256"] == run_weights_sha256(diffusion)


def test_only_requested_files_are_logged(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    (tmp_path / f"latents-{CONTRACT.key}").mkdir()
    (tmp_path / f"latents-{CONTRACT.key}" / "moments.npy").write_bytes(b"moments")
    run = make_run(tmp_path / "first", "vae")
    with pytest.raises(IndexError):  # no record was written
        log_outcome(run, mode="disabled")
    metadata, files = log_outcome(run, max_artifact_mb=1e-5).artifacts["autoencoder-first"]
    assert metadata["weights_sha256"] == "a" * 64 and files == ["autoencoder-first.json"]
    assert "autoencoder-first has 0 MB, more than logger.max_artifact_mb=1e-05" in capsys.readouterr().out
    _, files = log_outcome(run, upload_latents=True).artifacts[f"latents-{CONTRACT.key}"]
    assert "moments.npy" in files


def test_inputs_become_lineage_edges_online(tmp_path, monkeypatch):
    """Inputs logged by an earlier run are found by their digest; others are logged as a description."""
    used: list[Any] = []
    monkeypatch.setattr(wandb, "init", Recorder)

    def use_artifact(artifact, **_) -> None:
        if isinstance(artifact, str) and artifact.startswith("data"):
            raise wandb.errors.CommError("not found")
        used.append(artifact)

    run = start(tmp_path)
    run.mode, run.run.use_artifact = "online", use_artifact
    run.use_artifact(Artifact("autoencoder", "first", "a" * 64))
    run.use_artifact(Artifact("data", "pets", "d" * 64, {"data_fingerprint": "d" * 64}))
    by_name, described = used
    assert by_name == "autoencoder-first:sha-aaaaaaaaaaaa"
    assert (described.type, described.name, described.metadata["sha256"]) == ("data", "data-pets", "d" * 64)
    assert [entry.path for entry in described.manifest.entries.values()] == ["data-pets.json"]


def test_artifact_label_contents_and_digest(tmp_path):
    (tmp_path / "folder/inner").mkdir(parents=True)
    for name in ("folder/b", "folder/inner/a", "c"):
        (tmp_path / name).write_text(name)
    item = Artifact("data", "woman's hat / 2", "f" * 64, files=(tmp_path / "folder", tmp_path / "c"))
    assert item.label == "data-woman-s-hat-2" and set(item.contents) == {"b", "inner/a", "c"}
    assert sha256(item.files) == sha256("folder/bfolder/inner/ac")
    assert len(replace(item, name="x" * 300).label) == 128


def test_resumed_run_is_a_single_run_with_increasing_steps(tmp_path):
    run = make_run(tmp_path / "first", "vae")
    for resume, steps in ((False, (9, 19, 12)), (True, (29, 39))):
        tracker = make_loggers(options(), run, resume=resume).wandb
        for step in steps:
            tracker.log({"train/loss": 1.0}, step)
        tracker.finish()
    first, second = records(run.path)
    headers = [record.of("run")[0] for record in (first, second)]
    assert headers[0]["run_id"] == headers[1]["run_id"] == (run.path / "wandb_id.txt").read_text().strip()
    assert not headers[0].get("resume") and headers[1]["resume"], "an upload appends the second to the first"
    assert [row["step"] for record in (first, second) for row in record.rows] == [9, 19, 12, 29, 39]
    wandb_steps = [row["_step"] for record in (first, second) for row in record.rows]
    assert wandb_steps == sorted(set(wandb_steps)), "W&B's internal steps increase over both records"
