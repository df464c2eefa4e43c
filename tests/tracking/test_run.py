"""ldm.tracking.run: W&B never prompts, a resumed run continues its W&B run, and lineage is recorded."""

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


class FakeRun:
    """A fake W&B run."""

    def __init__(self, **options) -> None:
        self.options, self.id = options, options["id"]
        self.config, self.step, self.settings = {}, 0, SimpleNamespace(sync_dir="record")

    def define_metric(self, name, step_metric) -> None: ...

    def log(self, values, **options) -> None: ...


def start_run(folder, **options) -> WandbRun:
    return WandbRun(folder, {"a": {"b": 1}}, name="vae/demo", mode="offline", **options)


def test_flatten_converts_values_to_json_types():
    """Types that JSON does not support become strings, and mappings in a list are keyed by their index."""
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
        (None, "dryrun", True, "offline"),
        (None, "run", False, "online"),
        (None, "DISABLED", True, "disabled"),
    ],
)
def test_default_mode_is_online_only_with_an_api_key(monkeypatch, requested, environment, key, mode):
    monkeypatch.setenv("WANDB_MODE", environment)
    monkeypatch.delenv("WANDB_DISABLED", raising=False)
    monkeypatch.setattr(ldm.tracking.server, "has_key", lambda: key)
    assert choose_mode(requested) == mode
    monkeypatch.setenv("WANDB_MODE", "shared")
    with pytest.raises(UserError, match="WANDB_MODE=shared is unknown.*online, offline, disabled"):
        choose_mode(None)


@pytest.mark.parametrize(
    ("value", "mode"), [("true", "disabled"), ("1", "disabled"), ("false", "online"), ("", "online")]
)
def test_wandb_disabled_is_obeyed_unless_a_mode_is_requested(monkeypatch, value, mode):
    monkeypatch.setenv("WANDB_DISABLED", value)
    monkeypatch.setenv("WANDB_MODE", "online")
    assert choose_mode(None) == mode and choose_mode("offline") == "offline"


def test_has_key_does_not_contact_the_server(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()
    assert not has_key()
    (tmp_path / "netrc").write_text("machine 127.0.0.1:9 login user password " + "0" * 40)
    assert has_key()
    wandb.teardown()


def test_resumed_run_keeps_its_wandb_id(monkeypatch, tmp_path):
    """The id is kept even if a W&B sweep agent assigned it, or if an outage forces the run offline."""
    ids = iter(["agent-id"])
    monkeypatch.setattr(wandb, "init", lambda **options: FakeRun(**{**options, "id": next(ids, options["id"])}))
    run = start_run(tmp_path)
    assert (tmp_path / "wandb_id.txt").read_text() == "agent-id\n"
    assert read_run_id(tmp_path) == start_run(tmp_path, resume=True).run.options["id"] == "agent-id"
    assert start_run(tmp_path).run.id != "agent-id"
    run.mode, run.run.log = "online", None
    run.log({"loss": 1.0}, 0)
    assert run.mode == "offline" and run.run.options["id"] == "agent-id"
    assert read_run_id(tmp_path / "missing") is None


class Record:
    """Content of an offline run's folder, read with W&B's command line."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        process = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
        self.entries = [json.loads(line) for line in process.stdout.splitlines()]

    def select(self, kind: str) -> list[dict[str, Any]]:
        """Return all entries of a type."""
        return [entry[kind] for entry in self.entries if entry["type"] == kind]

    @property
    def config(self) -> dict[str, Any]:
        updates = [entry.get("config", entry) for entry in (*self.select("run"), *self.select("config"))]
        return {key: value for update in updates for key, value in update.get("update", {}).items()}

    @property
    def summary(self) -> dict[str, Any]:
        return {key: value for entry in self.select("summary") for key, value in entry["update"].items()}

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [history["item"] for history in self.select("history")]

    @property
    def artifacts(self) -> dict[str, tuple[dict[str, Any], list[str]]]:
        """Metadata and file names of each artifact."""
        return {
            item["name"]: (json.loads(item["metadata"]), [file["path"] for file in item["manifest"]["contents"]])
            for item in self.select("artifact")
            if item["type"] != "run_table"  # W&B creates these for tables
        }


def read_records(folder: Path) -> list[Record]:
    return [Record(path) for path in sorted((folder / "wandb").glob("offline-run-*"))]


CONTRACT = LatentContract("a" * 64, "d" * 64, resolution=16, factor=4, channels=12, val_fraction=0.1, flip=False)
SHARED_FACTS = {"format": 1, "data": "pets", "data_fingerprint": "d" * 64, "val_fraction": 0.1, "finished": 1.0}


def make_run(folder: Path, stage: str, **facts: Any) -> Run:
    """Create the folder of a finished run, with dummy weights."""
    weights = {"vae": ["autoencoder"], "diffusion": ["pipeline/network", "pipeline/vae"]}[stage]
    for subfolder in weights:
        (folder / subfolder).mkdir(parents=True)
        (folder / subfolder / "diffusion_pytorch_model.safetensors").write_bytes(b"weights of " + subfolder.encode())
    CONTRACT.save(folder if stage == "vae" else folder / "pipeline")
    (folder / "config.yaml").write_text("data: {cache_dir: null}\n")
    run = Run(folder, {**SHARED_FACTS, "stage": stage, "name": folder.name, **facts})
    run.save()
    return run


def logger_options(**overrides: Any) -> dict[str, Any]:
    settings = dict.fromkeys(OPTIONS) | {"project": "ldm", "tags": ["a tag"], "mode": "offline"}
    limits = {"timeout_s": 10, "finish_timeout_s": 10, "max_artifact_mb": 1, "upload_latents": False}
    return {"wandb": True, **settings, **limits, **overrides}


def log_outcome(run: Run, **overrides: Any) -> Record:
    loggers = make_loggers(logger_options(**overrides), run, resume=False)
    loggers.wandb.log({"train/loss": 0.5}, 10)
    Image.new("RGB", (4, 4)).save(run.path / "samples_final.png")
    loggers.log_outcome(run, {"steps": 10, "psnr_db": 20.0}, run.path / "samples_final.png")
    return read_records(run.path)[-1]


def test_offline_record_contains_metrics_config_images_and_artifacts(tmp_path):
    run = make_run(tmp_path / "first", "vae", commit="c0ffee", versions={"torch": "2"})
    record = log_outcome(run)
    loss, image = record.rows
    assert loss["train/loss"] == 0.5 and loss["step"] == 10
    assert image["samples_final._type"] == "images/separated"
    assert image["samples_final.captions"] == ["samples_final"]
    files = [file["path"] for entry in record.select("files") for file in entry["files"]]
    assert any(file.startswith("media/images/samples_final") for file in files)
    config = record.config
    assert (config["run.commit"], config["run.versions.torch"], config["inputs.data-pets"]) == ("c0ffee", "2", "d" * 64)
    assert record.summary["psnr_db"] == 20.0 and record.summary["steps"] == 10
    (header,) = record.select("run")
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
        {"logger": logger_options()},
        name="evaluation/diffusion/second",
        values={"fid": 3.0, "sampler": {"steps": 5}, "interval": [0.0, 1.0], "closest": [{"sample": 1}], "no": None},
        figures={},
        tables={"sweep": (["steps", "fd"], [[5, 1.5], [10, 1.25]])},
        inputs=outputs(diffusion)[:1],
        files=[report],
    )
    (record,) = read_records(diffusion.path / "evaluation")
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


def test_options_control_which_files_are_logged(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    (tmp_path / f"latents-{CONTRACT.key}").mkdir()
    (tmp_path / f"latents-{CONTRACT.key}" / "moments.npy").write_bytes(b"moments")
    run = make_run(tmp_path / "first", "vae")
    with pytest.raises(IndexError):  # there is no record
        log_outcome(run, mode="disabled")
    metadata, files = log_outcome(run, max_artifact_mb=1e-5).artifacts["autoencoder-first"]
    assert metadata["weights_sha256"] == "a" * 64 and files == ["autoencoder-first.json"]
    assert "autoencoder-first is 0 MB, more than logger.max_artifact_mb=1e-05" in capsys.readouterr().out
    _, files = log_outcome(run, upload_latents=True).artifacts[f"latents-{CONTRACT.key}"]
    assert "moments.npy" in files


def test_online_inputs_are_linked_by_digest_or_described(tmp_path, monkeypatch):
    """Inputs logged by an earlier run are found by their digest. All others are logged with a description only."""
    references: list[Any] = []
    monkeypatch.setattr(wandb, "init", FakeRun)

    def use_artifact(artifact, **_) -> None:
        if isinstance(artifact, str) and artifact.startswith("data"):
            raise wandb.errors.CommError("not found")
        references.append(artifact)

    run = start_run(tmp_path)
    run.mode, run.run.use_artifact = "online", use_artifact
    run.use_artifact(Artifact("autoencoder", "first", "a" * 64))
    run.use_artifact(Artifact("data", "pets", "d" * 64, {"data_fingerprint": "d" * 64}))
    reference, artifact = references
    assert reference == "autoencoder-first:sha-aaaaaaaaaaaa"
    assert (artifact.type, artifact.name, artifact.metadata["sha256"]) == ("data", "data-pets", "d" * 64)
    assert [entry.path for entry in artifact.manifest.entries.values()] == ["data-pets.json"]


def test_artifact_label_is_sanitised_and_digest_covers_all_files(tmp_path):
    (tmp_path / "folder/inner").mkdir(parents=True)
    for name in ("folder/b", "folder/inner/a", "c"):
        (tmp_path / name).write_text(name)
    item = Artifact("data", "woman's hat / 2", "f" * 64, files=(tmp_path / "folder", tmp_path / "c"))
    assert item.label == "data-woman-s-hat-2" and set(item.contents) == {"b", "inner/a", "c"}
    assert sha256(item.files) == sha256("folder/bfolder/inner/ac")
    assert len(replace(item, name="x" * 300).label) == 128


def test_resume_continues_the_same_wandb_run_with_increasing_steps(tmp_path):
    run = make_run(tmp_path / "first", "vae")
    for resume, steps in ((False, (9, 19, 12)), (True, (29, 39))):
        tracker = make_loggers(logger_options(), run, resume=resume).wandb
        for step in steps:
            tracker.log({"train/loss": 1.0}, step)
        tracker.finish()
    original, resumed = read_records(run.path)
    headers = [record.select("run")[0] for record in (original, resumed)]
    assert headers[0]["run_id"] == headers[1]["run_id"] == (run.path / "wandb_id.txt").read_text().strip()
    assert not headers[0].get("resume") and headers[1]["resume"], "uploading the second record must append to the first"
    assert [row["step"] for record in (original, resumed) for row in record.rows] == [9, 19, 12, 29, 39]
    wandb_steps = [row["_step"] for record in (original, resumed) for row in record.rows]
    assert wandb_steps == sorted(set(wandb_steps)), "W&B's internal steps must increase across both records"
