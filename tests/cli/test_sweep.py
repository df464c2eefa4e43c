"""Sweeps with Hydra's -m or a W&B agent start separate runs and report the jobs that failed."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

import ldm.runs.resume
from ldm.cli.command_line import CommandLine
from ldm.runtime.paths import bundled_folder
from ldm.tracking import run as tracking

ROOT = Path(__file__).parents[2]
SWEEP = yaml.safe_load((ROOT / "docs" / "wandb_sweep.yaml").read_text(encoding="utf-8"))
SHORT_RUN = [
    "trainer=cpu",
    "trainer.max_time=null",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.precision=32-true",
    "autoencoder.model.block_out_channels=[32]",
    "logger=csv",
]


@pytest.fixture(scope="module")
def multirun(make_images, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A multirun of three jobs, the second of which fails because its batch size is too large."""
    workdir = tmp_path_factory.mktemp("sweep")
    make_images(workdir / "squares", 40)
    data = ["data=image_folder", "data.path=squares", "data.resolution=16"]
    command = [sys.executable, "-m", "ldm.train", "-m", "stage=vae", *data, *SHORT_RUN, "batch_size=8,64,4"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LDM_CACHE": str(workdir / "cache"),
        "PYTHONUTF8": "1",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.run(command, cwd=workdir, env=environment, capture_output=True, text=True, encoding="utf-8")
    return workdir, process


def test_each_job_is_a_separate_run_and_failed_jobs_are_reported(multirun):
    workdir, process = multirun
    runs = sorted((workdir / "runs/vae").glob("[!.]*"), key=lambda run: run.name[-1])
    assert [run.name[-2:] for run in runs] == ["-0", "-2"], process.stderr
    for run, batch_size in zip(runs, (8, 4), strict=True):
        assert OmegaConf.load(run / "config.yaml").batch_size == batch_size
        facts = json.loads((run / "run.json").read_text())
        assert facts["finished"] and facts["figures"]["steps"] == 2 and facts["name"] == run.name
    assert process.returncode == 2 and "Traceback" not in process.stderr
    job_error, summary = process.stderr.strip().splitlines()[-2:]
    assert job_error.startswith("error in job 1 (batch_size=64): ") and "images" in job_error
    assert summary.startswith("error: 1 ") and summary.endswith(": job 1 (batch_size=64)")


def test_jobs_that_start_in_the_same_second_get_different_names(monkeypatch, tmp_path):
    monkeypatch.setattr(ldm.runs.resume.time, "strftime", lambda form: "20260101-000000")
    config = OmegaConf.create({"name": None, "runs_dir": str(tmp_path), "resume": False, "overwrite": False})
    choices = {"stage": "vae", "data": "squares", "autoencoder": "patch"}
    names = []
    for job in (None, 0, 1):
        command = CommandLine("train", (), (), (), choices, "train", job)
        names.append(ldm.runs.resume.ResumePlan.from_config(config, command, main_process=True).folder.name)
    assert names == [f"squares-patch-20260101-000000{suffix}" for suffix in ("", "-0", "-1")]


@pytest.mark.parametrize("is_open", [True, False])
def test_failed_job_closes_its_wandb_run(monkeypatch, is_open):
    """The next job in the process would otherwise log to the same W&B run."""
    wandb = Mock() if is_open else Mock(run=None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tracking.finish_open_run()
    assert not is_open or wandb.run.finish.call_args.kwargs == {"exit_code": 1}


def make_trial(key: str, position: int) -> dict:
    """Return a trial as sent by W&B: one key has its value at `position`, all other keys have their first value."""
    values = {name: options["values"][0] for name, options in SWEEP["parameters"].items()}
    values[key] = SWEEP["parameters"][key]["values"][position]
    return {"args": {name: {"value": value} for name, value in values.items()}}


@pytest.mark.parametrize("key", SWEEP["parameters"])
def test_wandb_sweep_config_produces_valid_command_lines(key):
    assert set(SWEEP) == {"program", "command", "method", "metric", "parameters"}
    assert SWEEP["command"][:4] == ["${env}", "${interpreter}", "-m", "${program}"] and SWEEP["program"] == "ldm.train"
    for position, value in enumerate(SWEEP["parameters"][key]["values"]):
        expanded = create_sweep_command_args(make_trial(key, position))["args_no_hyphens"]
        assert f"{key}={value}" in expanded and SWEEP["command"][-1] == "${args_no_hyphens}"
        with initialize_config_dir(str(bundled_folder("conf")), version_base="1.3"):
            config = compose("train", [*SWEEP["command"][4:-1], *expanded])
        assert OmegaConf.select(config, key) == value


def test_wandb_sweep_metric_is_logged(multirun):
    workdir, _ = multirun
    (metrics,) = (workdir / "runs/vae").glob("*-0/metrics.csv")
    with metrics.open(newline="") as file:
        assert SWEEP["metric"]["name"] in next(csv.reader(file))
    assert SWEEP["metric"]["goal"] == "maximize"
