"""stage=all trains two ordinary runs with the same name, checks both before training, and can be resumed."""

import json
import re
import signal
from pathlib import Path

import pytest

import ldm.train
from ldm.commands import train
from ldm.runs.run import Run
from ldm.runtime import child, signals
from ldm.runtime.paths import bundled_folder

BUDGET = ["trainer=cpu", "trainer.max_steps=2", "trainer.max_time=null", "trainer.precision=32-true", "logger=csv"]
TINY_MODELS = ["autoencoder.model.block_out_channels=[32]", "network=dit", "network.hidden_dim=32", "network.depth=1"]
OPTIONS = ["stage=all", "data=image_folder", "data.path=images", "data.resolution=16", "conditioning=none"]
OPTIONS += [*BUDGET, *TINY_MODELS, "network.head_dim=16", "batch_size=8"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, make_images) -> Path:
    workdir = tmp_path_factory.mktemp("workdir")
    make_images(workdir / "images", 40)
    return workdir


@pytest.fixture
def run_both_stages(call, workdir, tmp_path, monkeypatch):
    """Return a function that runs stage=all with fake training runs, and returns the result and each stage's command.

    A fake training run creates a finished run folder, unless `outcomes` has an exit code or exception for its stage.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LDM_CACHE", str(workdir / "cache"))
    (tmp_path / "images").symlink_to(workdir / "images")
    commands: list[list[str]] = []

    def run_both_stages(*options: str, outcomes=None):
        def run_python(arguments, _):
            commands.append(
                [argument for argument in arguments if argument not in ("-m", "ldm.train", *BUDGET, *TINY_MODELS)]
            )
            values = dict(argument.split("=", 1) for argument in arguments[2:])
            run = Path("runs", values["stage"], values["name"])
            finished = None if values["stage"] in (outcomes or {}) else 1.0
            run.mkdir(parents=True, exist_ok=True)
            facts = {"format": 1, "stage": values["stage"], "name": run.name, "started": 1.0, "finished": finished}
            (run / "run.json").write_text(json.dumps(facts))
            outcome = (outcomes or {}).get(values["stage"], 0)
            if isinstance(outcome, Exception | KeyboardInterrupt):
                raise outcome
            return outcome

        monkeypatch.setattr(child, "run_python", run_python)
        commands.clear()
        train._trained_autoencoders.clear()
        return call(ldm.train.main, *OPTIONS, *options), commands

    return run_both_stages


def test_options_apply_to_both_stages_or_to_one(run_both_stages):
    result, (vae_command, diffusion_command) = run_both_stages(
        "name=a", "stage1.batch_size=4", "stage2.optimizer.lr=1e-3", "+stage2.optimizer.note=1"
    )
    assert result.code == 0, result.err
    shared = ["data=image_folder", "data.path=images", "data.resolution=16"]
    assert vae_command == ["stage=vae", *shared, "batch_size=4", "name=a"]
    specific = ["conditioning=none", "network.head_dim=16", "batch_size=8", "optimizer.lr=1e-3", "+optimizer.note=1"]
    assert diffusion_command == ["stage=diffusion", *shared, *specific, "vae=runs/vae/a", "name=a"]


def test_sweep_reuses_an_autoencoder_with_the_same_options(run_both_stages):
    result, commands = run_both_stages("name=${hydra:job.num}", "stage2.seed=1,2", "stage1.seed=3,4", "-m")
    assert result.code == 0, result.err
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
    ("stage", "options", "continue_options"),
    [
        ("vae", [], ["resume=true"]),
        ("diffusion", [], ["resume=true"]),
        ("vae", ["overwrite=true"], ["resume=true", "stage2.overwrite=true"]),
        ("diffusion", ["overwrite=true"], ["resume=true"]),
    ],
)
def test_printed_command_continues_an_interrupted_stage(run_both_stages, stage, options, continue_options):
    result, _ = run_both_stages("name=a", *options, outcomes={stage: signals.Interrupted(signal.SIGTERM)})
    assert result.code == 143 and f"stopped by SIGTERM in stage={stage}" in result.err
    assert result.err.split()[-len(continue_options) - 1 :] == ["name=a", *continue_options]
    result, commands = run_both_stages("name=a", *continue_options)
    assert result.code == 0
    assert commands[0][0] == f"stage={stage}" and commands[0][-1] == "resume=true", "finished stages are skipped"
    assert "runs/vae/a is already finished" in result.out or stage == "vae"


def test_failed_first_stage_stops_the_command(run_both_stages):
    result, commands = run_both_stages("name=a", outcomes={"vae": 2})
    assert result.code == 2 and len(commands) == 1
    assert re.search("stage=vae failed.*To continue both stages: ", result.err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["conditioning=text"], "conditioning=text needs captions"),
        (["network.depth=0"], "network.depth=0 must be 1 or more"),
        (["stage2.batch_size=64"], "batch_size=64"),
        (["stage1.nosuch=1"], "There is no key nosuch"),
        (["vae=images"], "vae=images"),
        (["resume=true", "name="], "name=NAME"),
        (["resume=a.ckpt"], "resume=a.ckpt is a checkpoint of a single stage"),
    ],
)
def test_errors_in_either_stage_are_reported_before_training(run_both_stages, options, message):
    result, commands = run_both_stages("name=a", *options)
    assert result.code == 2 and message in result.err and not commands
    assert not Path("runs").exists()


def test_stage_prefix_is_rejected_without_stage_all(call):
    result = call(ldm.train.main, "stage=vae", "stage1.batch_size=4")
    assert result.code == 2 and "only for stage=all" in result.err


def test_existing_runs_are_not_replaced(run_both_stages):
    assert run_both_stages("name=a")[0].code == 0
    result, commands = run_both_stages("name=a")
    assert result.code == 2 and "runs/vae/a already exists" in result.err and not commands


def test_both_stages_train_end_to_end(call, workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    monkeypatch.setenv("LDM_CACHE", str(workdir / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(bundled_folder("conf").parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = call(ldm.train.main, *OPTIONS, "name=real")
    assert result.code == 0, result
    vae, diffusion = Run.open("runs/vae/real"), Run.open("runs/diffusion/real")
    assert vae.finished and diffusion.finished and diffusion.facts["vae"] == "runs/vae/real"
    assert (diffusion.images / "samples_final.png").is_file()
