"""stage=all: two ordinary runs of one name, checked before the first begins, and continued wherever it stopped."""

import json
import signal
from pathlib import Path

import pytest

import ldm.train
from ldm.commands import train
from ldm.runs.run import Run
from ldm.runtime import child, signals
from ldm.runtime.paths import folder

SHORT = ["trainer=cpu", "trainer.max_steps=2", "trainer.max_time=null", "trainer.precision=32-true", "logger=csv"]
TINY = ["autoencoder.model.block_out_channels=[32]", "network=dit", "network.hidden_dim=32", "network.depth=1"]
BOTH = ["stage=all", "data=image_folder", "data.path=pictures", "data.resolution=16", "conditioning=none"]
BOTH += [*SHORT, *TINY, "network.head_dim=16", "batch_size=8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_images) -> Path:
    place = tmp_path_factory.mktemp("place")
    make_images(place / "pictures", 40)
    return place


@pytest.fixture
def trained(call, place, tmp_path, monkeypatch):
    """trained(*options): what stage=all has its stages do, without doing it, and how it ends.

    Each stage leaves a run folder; `ends` says how a stage ends instead.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LDM_CACHE", str(place / "cache"))
    (tmp_path / "pictures").symlink_to(place / "pictures")
    commands: list[list[str]] = []

    def trained(*options: str, ends=None):
        def run_python(arguments, _):
            commands.append([argument for argument in arguments if argument not in ("-m", "ldm.train", *SHORT, *TINY)])
            values = dict(argument.split("=", 1) for argument in arguments[2:])
            run = Path("runs", values["stage"], values["name"])
            finished = None if values["stage"] in (ends or {}) else 1.0
            run.mkdir(parents=True, exist_ok=True)
            facts = {"format": 1, "stage": values["stage"], "name": run.name, "started": 1.0, "finished": finished}
            (run / "run.json").write_text(json.dumps(facts))
            if isinstance(how := (ends or {}).get(values["stage"], 0), Exception | KeyboardInterrupt):
                raise how
            return how

        monkeypatch.setattr(child, "run_python", run_python)
        commands.clear()
        train._trained.clear()
        return call(ldm.train.main, *BOTH, *options), commands

    return trained


def test_options_are_for_both_stages_or_for_one(trained):
    ended, (first, second) = trained(
        "name=a", "stage1.batch_size=4", "stage2.optimizer.lr=1e-3", "+stage2.optimizer.note=1"
    )
    assert ended.code == 0, ended.err
    shared = ["data=image_folder", "data.path=pictures", "data.resolution=16"]
    assert first == ["stage=vae", *shared, "batch_size=4", "name=a"]
    alone = ["conditioning=none", "network.head_dim=16", "batch_size=8", "optimizer.lr=1e-3", "+optimizer.note=1"]
    assert second == ["stage=diffusion", *shared, *alone, "vae=runs/vae/a", "name=a"]


def test_a_sweep_uses_an_autoencoder_of_the_same_options_again(trained):
    ended, commands = trained("name=${hydra:job.num}", "stage2.seed=1,2", "stage1.seed=3,4", "-m")
    assert ended.code == 0, ended.err
    names = [
        (command[0], command[-1], next((o for o in command if o.startswith("vae=")), None)) for command in commands
    ]
    assert names == [
        ("stage=vae", "name=0", None),
        ("stage=diffusion", "name=0", "vae=runs/vae/0"),
        ("stage=vae", "name=1", None),
        ("stage=diffusion", "name=1", "vae=runs/vae/1"),
        ("stage=diffusion", "name=2", "vae=runs/vae/0"),
        ("stage=diffusion", "name=3", "vae=runs/vae/1"),
    ]


@pytest.mark.parametrize(
    ("stage", "given", "goes_on"),
    [
        ("vae", [], ["resume=true"]),
        ("diffusion", [], ["resume=true"]),
        ("vae", ["overwrite=true"], ["resume=true", "stage2.overwrite=true"]),
        ("diffusion", ["overwrite=true"], ["resume=true"]),
    ],
)
def test_what_stopped_goes_on(trained, stage, given, goes_on):
    ended, _ = trained("name=a", *given, ends={stage: signals.Interrupted(signal.SIGTERM)})
    assert ended.code == 143 and f"stopped by SIGTERM in stage={stage}" in ended.err
    assert ended.err.split()[-len(goes_on) - 1 :] == ["name=a", *goes_on]
    ended, commands = trained("name=a", *goes_on)
    assert ended.code == 0
    assert commands[0][0] == f"stage={stage}" and commands[0][-1] == "resume=true", "what is finished is kept"
    assert "runs/vae/a is finished and kept" in ended.out or stage == "vae"


def test_a_stage_that_fails_ends_both(trained):
    ended, commands = trained("name=a", ends={"vae": 2})
    assert ended.code == 2 and len(commands) == 1
    assert "stage=vae ended for the reason given above. To go on with both stages: " in ended.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["conditioning=text"], "conditioning=text needs captions"),
        (["network.depth=0"], "network.depth=0 must be 1 or more"),
        (["stage2.batch_size=64"], "fewer than batch_size=64"),
        (["stage1.nosuch=1"], "There is no key nosuch"),
        (["vae=pictures"], "vae=pictures is one: choose stage=diffusion"),
        (["resume=true", "name="], "add name=NAME"),
        (["resume=a.ckpt"], "resume=a.ckpt is a checkpoint of one stage"),
    ],
)
def test_mistakes_in_either_stage_end_it_before_the_first(trained, options, said):
    ended, commands = trained("name=a", *options)
    assert ended.code == 2 and said in ended.err and not commands
    assert not Path("runs").exists()


def test_an_option_of_one_stage_is_refused_without_both(call):
    ended = call(ldm.train.main, "stage=vae", "stage1.batch_size=4")
    assert ended.code == 2 and "go with stage=all" in ended.err


def test_runs_that_are_there_are_kept(trained):
    assert trained("name=a")[0].code == 0
    ended, commands = trained("name=a")
    assert ended.code == 2 and "runs/vae/a exists already" in ended.err and not commands


def test_two_stages_from_pictures_to_samples(call, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("LDM_CACHE", str(place / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(folder("conf").parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ended = call(ldm.train.main, *BOTH, "name=real")
    assert ended.code == 0, ended
    vae, diffusion = Run.open("runs/vae/real"), Run.open("runs/diffusion/real")
    assert vae.finished and diffusion.finished and diffusion.facts["vae"] == "runs/vae/real"
    assert (diffusion.images / "samples_final.png").is_file()
