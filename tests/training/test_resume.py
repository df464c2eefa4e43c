"""A resumed run ends in the same state as an uninterrupted run: weights, EMA, optimizers, schedule and RNG."""

import json
import os
import random
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import ldm.train
from ldm.errors import UserError
from ldm.runs.checkpoints import list_checkpoints
from ldm.training.callbacks.checkpoints import Checkpoints
from ldm.training.fit import Fit
from tests.small_training import states_equal

DATA = ["data=image_folder", "data.path=pets", "data.resolution=16", "data.val_fraction=0.2", "logger=csv"]
BUDGET = ["trainer=cpu", "trainer.max_time=null", "trainer.max_steps=7", "trainer.val_check_interval=3", "batch_size=8"]
STAGES = {
    "vae": [
        "autoencoder.model.block_out_channels=[32]",
        *("adversarial=hinge", "adversarial.start=3", "adversarial.ramp=2", "adversarial.channels=8"),
        *("adversarial.layers=1", "optimizer.warmup_steps=3", "data.flip=true"),
    ],
    "diffusion": [
        *("vae=identity", "conditioning=none", "network=dit", "network.hidden_dim=32", "network.depth=1"),
        *("network.head_dim=16", "network.patch_size=4", "objective=vlb", "sampler.steps=2", "data.flip=true"),
    ],
}


DECODER_NOISE = "autoencoder.decoder_noise=1"
STATE_KEYS = ("state_dict", "optimizer_states", "lr_schedulers", "adversary", "random", "global_step")


def load_state(run: Path) -> dict:
    """Return the training state in the newest checkpoint of a run, without the elapsed time."""
    state = torch.load(list_checkpoints(run / "checkpoints")[0].path, weights_only=True)
    return {name: state.get(name) for name in STATE_KEYS} | {"ema": state["callbacks"]["EMACallback"]}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, make_images) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    make_images(folder / "pets", 60)
    return folder


@pytest.fixture
def train(workspace, call, monkeypatch):
    """train(stage, name, *options, code=0): train a stage for seven steps and return the run folder."""
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("LDM_CACHE", str(workspace / "cache"))

    def train(stage: str, name: str, *options: str, code: int = 0) -> Path:
        result = call(ldm.train.main, f"stage={stage}", f"name={name}", *STAGES[stage], *DATA, *BUDGET, *options)
        assert result.code == code, result
        assert code == 0 or "python -m ldm.train" in result.err and f"name={name} resume=true" in result.err
        return workspace / "runs" / stage / name

    return train


@pytest.fixture
def stop(monkeypatch):
    """stop(hook, step): send one SIGTERM in the given callback hook at the given step."""

    def stop(hook: str, step: int) -> None:
        original = getattr(Checkpoints, hook)

        def send_signal(self, trainer, *args, **kwargs):
            if trainer.global_step == step and not sent:
                sent.append(step)
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, trainer, *args, **kwargs)

        sent: list[int] = []
        monkeypatch.setattr(Checkpoints, hook, send_signal)

    return stop


@pytest.fixture(scope="module")
def uninterrupted() -> dict[tuple[str, str], dict]:
    """Cache of the final states of uninterrupted runs, by stage and precision."""
    return {}


def check_resume(train, stop, uninterrupted, stage: str, precision: str, hook: str, step: int, *extra: str) -> None:
    options = [f"trainer.precision={precision}", *extra]
    if (stage, precision) not in uninterrupted:
        uninterrupted[stage, precision] = load_state(train(stage, f"uninterrupted-{precision}", *options))
    name = "-".join([precision, hook, str(step), *(["two-phases"] if extra else [])])
    stop(hook, step)
    resumed = train(stage, name, *options, code=128 + signal.SIGTERM)
    assert list_checkpoints(resumed / "checkpoints")[0].step <= step + 1 and not (resumed / "autoencoder").exists()
    train(stage, name, *options, "resume=true")
    assert list_checkpoints(resumed / "checkpoints")[0].step == 7
    assert states_equal(load_state(resumed), uninterrupted[stage, precision])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", STAGES)
def test_resume_after_a_stop_mid_epoch(train, stop, uninterrupted, stage, precision):
    check_resume(train, stop, uninterrupted, stage, precision, "on_train_batch_start", 4)


@pytest.mark.parametrize("step", [4, 5])
def test_resume_in_the_second_phase(train, stop, step):
    """Of seven steps, step 4 is the first of the second phase, which trains the sampling decoder."""
    expected = load_state(train("vae", f"two-phases-{step}", "trainer.precision=32-true", DECODER_NOISE))
    assert expected["ema"]["in_second_phase"]
    check_resume(
        *(train, stop, {("vae", "32-true"): expected}, "vae", "32-true", "on_train_batch_start", step), DECODER_NOISE
    )


@pytest.mark.parametrize(("hook", "step"), [("on_validation_batch_end", 3), ("on_train_batch_end", 6)])
def test_resume_after_a_stop_during_validation(train, stop, uninterrupted, workspace, hook, step):
    """The interrupted validation runs again from its first batch and is logged once, with the same metrics."""
    check_resume(train, stop, uninterrupted, "vae", "32-true", hook, step)
    expected, resumed = (workspace / "runs/vae" / name for name in ("uninterrupted-32-true", f"32-true-{hook}-{step}"))
    assert validations(resumed) == validations(expected)


def validations(run: Path) -> list[tuple[str, str]]:
    header, *lines = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    return [(row["step"], row["val/loss"]) for row in rows if row["val/loss"]]


@pytest.mark.slow
@pytest.mark.parametrize("step", range(7))
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", STAGES)
def test_resume_after_a_stop_at_any_step(train, stop, uninterrupted, stage, precision, hook, step):
    check_resume(train, stop, uninterrupted, stage, precision, hook, step + (hook == "on_train_batch_end"))


def test_resume_restores_global_generators_with_accumulated_batches(train, stop, monkeypatch):
    """Draws from the global generators of torch, random and numpy continue as in an uninterrupted run."""
    from ldm.training.modules.autoencoder import VAETraining

    draws: list[tuple[float, float, float]] = []
    losses = VAETraining.losses

    def noisy_losses(self, images, row_draws):
        if not self.trainer.validating:
            draws.append((torch.rand(()).item(), random.random(), float(np.random.rand())))  # noqa: NPY002
        return losses(self, images + 0.01 * (draws[-1][0] if draws else 0.0), row_draws)

    monkeypatch.setattr(VAETraining, "measure_each_mode", lambda *_: {False: 0.1})
    monkeypatch.setattr(VAETraining, "losses", noisy_losses)
    options = ["trainer.precision=32-true", "trainer.accumulate_grad_batches=2"]
    uninterrupted = train("vae", "noisy-uninterrupted", *options)
    expected, draws = draws[:], []
    stop("on_train_batch_start", 4)
    train("vae", "noisy", *options, code=143)
    resumed = train("vae", "noisy", *options, "resume=true")
    assert draws == expected and len({torch_draw for torch_draw, _, _ in draws}) == 14
    assert states_equal(load_state(resumed), load_state(uninterrupted))


RUN_OPTIONS = ["trainer.precision=32-true", "runs_dir=runs2"]
TINY_VAE = ["autoencoder.model.block_out_channels=[32]", "trainer.max_steps=2"]
TINY_DIFFUSION = ["conditioning=none", *STAGES["diffusion"][2:7], "network.patch_size=1", "sampler.steps=2"]


@pytest.fixture
def command(workspace, call, monkeypatch):
    """command(*options): train on the images and return the exit code and output."""
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("LDM_CACHE", str(workspace / "cache"))
    return lambda *options: call(ldm.train.main, *DATA, *BUDGET, *RUN_OPTIONS, *options)


def load_facts(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


@pytest.fixture
def diffusion_run(command, workspace) -> Path:
    """A two-step diffusion run on `first`, which was the newest autoencoder when the run started."""
    run = workspace / "runs2/diffusion/ddpm"
    if not run.exists():
        assert command("stage=vae", "name=first", *TINY_VAE).code == 0
        assert command("stage=diffusion", "name=ddpm", *TINY_DIFFUSION, "trainer.max_steps=2").code == 0
    return run


def read_records(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in ("run.json", "config.yaml")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TINY_DIFFUSION[:1], r"network\._target_ .*ldm\.networks\.dit\.DiT.*ldm\.networks\.unet\.unet.*network\."),
        (
            [*TINY_DIFFUSION, "optimizer=adamw"],
            r"optimizer\.build\._target_ .*ldm\.training\.optim\.muon\.MuonAdamW.*torch",
        ),
        ([*TINY_DIFFUSION, "seed=1"], r"seed\b.*\b0\b.*\b1\b"),
        ([*TINY_DIFFUSION, "data.flip=true"], r"data\.flip\b.*False.*True"),
    ],
)
def test_resume_rejects_options_that_differ_from_the_original_run(command, diffusion_run, options, message):
    """The error gives the options and the command to resume. The run is not changed."""
    files = read_records(diffusion_run)
    result = command("stage=diffusion", "name=ddpm", "resume=true", *options)
    assert result.code == 2 and re.search(message, result.err) and "Traceback" not in result.err, result
    assert "python -m ldm.train data=image_folder data.path=pets" in result.err
    assert "network=dit network.hidden_dim=32" in result.err and "name=ddpm resume=true" in result.err
    assert read_records(diffusion_run) == files


def test_resume_keeps_run_json_and_config_until_training_starts(command, diffusion_run, monkeypatch):
    def raise_error(*_):
        raise UserError("no memory left")

    files = read_records(diffusion_run)
    monkeypatch.setattr(Fit, "run_to_completion", raise_error)
    result = command("stage=diffusion", "name=ddpm", "resume=true", *TINY_DIFFUSION)
    assert result.code == 2 and "no memory left" in result.err and read_records(diffusion_run) == files


def test_resume_keeps_the_autoencoder_of_the_run(command, diffusion_run):
    """A newer autoencoder is not selected, and a different `vae` is rejected. The learning rate can change."""
    assert command("stage=vae", "name=second", *TINY_VAE, "seed=1").code == 0
    original = load_facts(diffusion_run)
    options = ["stage=diffusion", "name=ddpm", *TINY_DIFFUSION, "trainer.max_steps=3"]
    result = command(*options, "resume=true", "vae=runs2/vae/second")
    assert result.code == 2 and "vae=runs2/vae/first (" in result.err and "vae=runs2/vae/second (" in result.err, result
    assert load_facts(diffusion_run) == original
    result = command(*options, "resume=true", "optimizer.lr=1e-3")
    resumed = load_facts(diffusion_run)
    assert result.code == 0 and resumed["finished"] and resumed["figures"]["steps"] == 3, result
    assert "optimizer.lr 0.004 -> 0.001; trainer.max_steps 2 -> 3" in result.out
    assert (resumed["vae"], resumed["contract"]) == (original["vae"], original["contract"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["trainer.guard.max_spike=1"], r"trainer\.guard\.max_spike=1 must .*\b1\b"),
        (["trainer.devices=0"], r"trainer\.\*.*trainer=cpu"),
        (["logger=wandb", "logger.mode=onlin"], r"logger\.mode=onlin\b.*online.*offline"),
        ([], r"disk space.*checkpoint"),
    ],
)
def test_overwrite_keeps_the_old_run_if_the_new_run_cannot_start(command, diffusion_run, monkeypatch, options, message):
    if not options:
        monkeypatch.setattr("ldm.runs.disk.checkpoint_bytes", lambda _: 1 << 60)
    content = {file: file.read_bytes() for file in sorted(diffusion_run.rglob("*")) if file.is_file()}
    result = command("stage=diffusion", "name=ddpm", "overwrite=true", *TINY_DIFFUSION, *options)
    assert result.code == 2 and re.search(message, result.err), result
    assert {file: file.read_bytes() for file in sorted(diffusion_run.rglob("*")) if file.is_file()} == content
