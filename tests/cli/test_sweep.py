"""Several trainings from one command line, by Hydra's -m or a W&B agent: runs of their own, failures with a name."""

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
from ldm.runtime.paths import folder
from ldm.tracking import run as tracking

ROOT = Path(__file__).parents[2]
SWEEP = yaml.safe_load((ROOT / "docs" / "wandb_sweep.yaml").read_text(encoding="utf-8"))
SHORT = [
    "trainer=cpu",
    "trainer.max_time=null",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.precision=32-true",
    "autoencoder.model.block_out_channels=[32]",
    "logger=csv",
]


@pytest.fixture(scope="module")
def swept(make_images, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder in which two of three jobs were trained, the one between them having asked for too large a batch."""
    place = tmp_path_factory.mktemp("sweep")
    make_images(place / "squares", 40)
    data = ["data=image_folder", "data.path=squares", "data.resolution=16"]
    command = [sys.executable, "-m", "ldm.train", "-m", "stage=vae", *data, *SHORT, "batch_size=8,64,4"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LDM_CACHE": str(place / "cache"),
        "PYTHONUTF8": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, encoding="utf-8")
    return place, done


def test_each_job_is_a_run_of_its_own_and_one_that_fails_is_named(swept):
    place, done = swept
    runs = sorted((place / "runs/vae").glob("[!.]*"), key=lambda run: run.name[-1])
    assert [run.name[-2:] for run in runs] == ["-0", "-2"], done.stderr
    for run, batch_size in zip(runs, (8, 4), strict=True):
        assert OmegaConf.load(run / "config.yaml").batch_size == batch_size
        facts = json.loads((run / "run.json").read_text())
        assert facts["finished"] and facts["figures"]["steps"] == 2 and facts["name"] == run.name
    assert done.returncode == 2 and "Traceback" not in done.stderr
    first, last = done.stderr.strip().splitlines()[-2:]
    assert first.startswith("error in job 1 (batch_size=64): There are ") and "fewer than batch_size=64" in first
    assert last == "error: 1 of the jobs failed: job 1 (batch_size=64)"


def test_jobs_of_the_same_second_have_names_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr(ldm.runs.resume.time, "strftime", lambda form: "20260101-000000")
    config = OmegaConf.create({"name": None, "runs_dir": str(tmp_path), "resume": False, "overwrite": False})
    choices = {"stage": "vae", "data": "squares", "autoencoder": "patch"}
    found = []
    for job in (None, 0, 1):
        command = CommandLine("train", (), (), (), choices, "train", job)
        found.append(ldm.runs.resume.Continuation.plan(config, command, main_process=True).folder.name)
    assert found == [f"squares-patch-20260101-000000{end}" for end in ("", "-0", "-1")]


@pytest.mark.parametrize("is_open", [True, False])
def test_a_failed_job_leaves_no_open_wandb_run(monkeypatch, is_open):
    """The next job in the process would log into it."""
    wandb = Mock() if is_open else Mock(run=None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tracking.finish_open_run()
    assert not is_open or wandb.run.finish.call_args.kwargs == {"exit_code": 1}


def trials(key: str, position: int) -> dict:
    """A trial as W&B's server sends it, with that value of one key and the first of the others."""
    values = {name: options["values"][0] for name, options in SWEEP["parameters"].items()}
    values[key] = SWEEP["parameters"][key]["values"][position]
    return {"args": {name: {"value": value} for name, value in values.items()}}


@pytest.mark.parametrize("key", SWEEP["parameters"])
def test_the_wandb_sweep_calls_the_command_line(key):
    assert set(SWEEP) == {"program", "command", "method", "metric", "parameters"}
    assert SWEEP["command"][:4] == ["${env}", "${interpreter}", "-m", "${program}"] and SWEEP["program"] == "ldm.train"
    for position, value in enumerate(SWEEP["parameters"][key]["values"]):
        expanded = create_sweep_command_args(trials(key, position))["args_no_hyphens"]
        assert f"{key}={value}" in expanded and SWEEP["command"][-1] == "${args_no_hyphens}"
        with initialize_config_dir(str(folder("conf")), version_base="1.3"):
            config = compose("train", [*SWEEP["command"][4:-1], *expanded])
        assert OmegaConf.select(config, key) == value


def test_the_wandb_sweep_asks_for_a_figure_that_is_logged(swept):
    place, _ = swept
    (metrics,) = (place / "runs/vae").glob("*-0/metrics.csv")
    with metrics.open(newline="") as file:
        assert SWEEP["metric"]["name"] in next(csv.reader(file))
    assert SWEEP["metric"]["goal"] == "maximize"
