"""A run that was stopped and continued ends as one that never stopped: weights, average, optimizers, schedule, RNG."""

import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import ldm.train
from ldm.errors import UserError
from ldm.runs.checkpoints import manifests
from ldm.training.callbacks.checkpoints import Checkpoints
from ldm.training.fit import Fit
from tests.small_training import same

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


PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "adversary", "random", "global_step")


def state_of(run: Path) -> dict:
    """Of the run's newest checkpoint, all that training goes on from; seconds are no part of it."""
    state = torch.load(manifests(run / "checkpoints")[0].path, weights_only=True)
    return {name: state.get(name) for name in PARTS} | {"ema": state["callbacks"]["EMACallback"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_images) -> Path:
    folder = tmp_path_factory.mktemp("place")
    make_images(folder / "pets", 60)
    return folder


@pytest.fixture
def train(place, call, monkeypatch):
    """Run a stage for seven steps; returns its folder."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("LDM_CACHE", str(place / "cache"))

    def train(stage: str, name: str, *options: str, code: int = 0) -> Path:
        ended = call(ldm.train.main, f"stage={stage}", f"name={name}", *STAGES[stage], *DATA, *BUDGET, *options)
        assert ended.code == code, ended
        assert code == 0 or "python -m ldm.train" in ended.err and f"name={name} resume=true" in ended.err
        return place / "runs" / stage / name

    return train


@pytest.fixture
def stop(monkeypatch):
    """stop(hook, step): SIGTERM arrives in that hook of the trainer, at that step, once."""

    def stop(hook: str, step: int) -> None:
        original = getattr(Checkpoints, hook)

        def arrives(self, trainer, *args, **kwargs):
            if trainer.global_step == step and not sent:
                sent.append(step)
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, trainer, *args, **kwargs)

        sent: list[int] = []
        monkeypatch.setattr(Checkpoints, hook, arrives)

    return stop


@pytest.fixture(scope="module")
def never_stopped() -> dict[tuple[str, str], dict]:
    """The last state of each stage and precision, once."""
    return {}


def check(train, stop, never_stopped, stage: str, precision: str, hook: str, step: int) -> None:
    options = [f"trainer.precision={precision}"]
    if (stage, precision) not in never_stopped:
        never_stopped[stage, precision] = state_of(train(stage, f"whole-{precision}", *options))
    name = f"{precision}-{hook}-{step}"
    stop(hook, step)
    parts = train(stage, name, *options, code=128 + signal.SIGTERM)
    assert manifests(parts / "checkpoints")[0].step <= step + 1 and not (parts / "autoencoder").exists()
    train(stage, name, *options, "resume=true")
    assert manifests(parts / "checkpoints")[0].step == 7
    assert same(state_of(parts), never_stopped[stage, precision])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", STAGES)
def test_stopped_in_mid_epoch(train, stop, never_stopped, stage, precision):
    check(train, stop, never_stopped, stage, precision, "on_train_batch_start", 4)


@pytest.mark.parametrize(("hook", "step"), [("on_validation_batch_end", 3), ("on_train_batch_end", 6)])
def test_stopped_in_validation(train, stop, never_stopped, place, hook, step):
    """Amid one, and where one is due: it is run after the resume, once, whole, with the same figures."""
    check(train, stop, never_stopped, "vae", "32-true", hook, step)
    whole, parts = (place / "runs/vae" / name for name in ("whole-32-true", f"32-true-{hook}-{step}"))
    assert validations(parts) == validations(whole)


def validations(run: Path) -> list[tuple[str, str]]:
    header, *lines = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    return [(row["step"], row["val/loss"]) for row in rows if row["val/loss"]]


@pytest.mark.slow
@pytest.mark.parametrize("step", range(7))
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", STAGES)
def test_stopped_at_any_step(train, stop, never_stopped, stage, precision, hook, step):
    check(train, stop, never_stopped, stage, precision, hook, step + (hook == "on_train_batch_end"))


def test_accumulated_batches_and_dropout_go_on(train, stop, monkeypatch):
    """What draws from the global generators does so as if nothing had happened."""
    from ldm.training.modules.autoencoder import VAETraining

    drawn: list[tuple[float, float, float]] = []
    losses = VAETraining.losses

    def noisy(self, images, generator):
        if not self.trainer.validating:
            drawn.append((torch.rand(()).item(), random.random(), float(np.random.rand())))  # noqa: NPY002
        return losses(self, images + 0.01 * (drawn[-1][0] if drawn else 0.0), generator)

    monkeypatch.setattr(VAETraining, "each_way", lambda *_: {False: 0.1})
    monkeypatch.setattr(VAETraining, "losses", noisy)
    options = ["trainer.precision=32-true", "trainer.accumulate_grad_batches=2"]
    whole = train("vae", "noisy-whole", *options)
    expected, drawn = drawn[:], []
    stop("on_train_batch_start", 4)
    train("vae", "noisy", *options, code=143)
    parts = train("vae", "noisy", *options, "resume=true")
    assert drawn == expected and len({first for first, _, _ in drawn}) == 14
    assert same(state_of(parts), state_of(whole))


OWN = ["trainer.precision=32-true", "runs_dir=own"]
TINY_VAE = ["autoencoder.model.block_out_channels=[32]", "trainer.max_steps=2"]
TINY_DIFFUSION = ["conditioning=none", *STAGES["diffusion"][2:7], "network.patch_size=1", "sampler.steps=2"]


@pytest.fixture
def command(place, call, monkeypatch):
    """Train with exactly these options and what the images are; returns how it ended."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("LDM_CACHE", str(place / "cache"))
    return lambda *options: call(ldm.train.main, *DATA, *BUDGET, *OWN, *options)


def facts_of(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


@pytest.fixture
def mine(command, place) -> Path:
    """A stage 2 of two steps on the autoencoder that was the newest then."""
    run = place / "own/diffusion/mine"
    if not run.exists():
        assert command("stage=vae", "name=first", *TINY_VAE).code == 0
        assert command("stage=diffusion", "name=mine", *TINY_DIFFUSION, "trainer.max_steps=2").code == 0
    return run


def record_of(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in ("run.json", "config.yaml")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (TINY_DIFFUSION[:1], "network._target_ was ldm.networks.dit.DiT and is ldm.networks.unet.unet now; network."),
        (
            [*TINY_DIFFUSION, "optimizer=adamw"],
            "optimizer.build._target_ was ldm.training.optim.muon.MuonAdamW and is torch",
        ),
        ([*TINY_DIFFUSION, "seed=1"], "seed was 0 and is 1 now. Give"),
        ([*TINY_DIFFUSION, "data.flip=true"], "data.flip was False and is True now. Give"),
    ],
)
def test_other_options_than_a_run_was_started_with(command, mine, options, said):
    """They are named, with the command that goes on, and nothing of the run is touched."""
    before = record_of(mine)
    ended = command("stage=diffusion", "name=mine", "resume=true", *options)
    assert ended.code == 2 and said in ended.err and "Traceback" not in ended.err, ended
    assert "python -m ldm.train data=image_folder data.path=pets" in ended.err
    assert "network=dit network.hidden_dim=32" in ended.err and "name=mine resume=true" in ended.err
    assert record_of(mine) == before


def test_the_record_stays_until_training_begins(command, mine, monkeypatch):
    def fails(*_):
        raise UserError("no memory left")

    before = record_of(mine)
    monkeypatch.setattr(Fit, "to_the_end", fails)
    ended = command("stage=diffusion", "name=mine", "resume=true", *TINY_DIFFUSION)
    assert ended.code == 2 and "no memory left" in ended.err and record_of(mine) == before


def test_a_run_goes_on_on_its_own_latents(command, mine, place):
    """Whatever autoencoder is the newest by now; another one's latents are refused by name. Its rate may change."""
    assert command("stage=vae", "name=second", *TINY_VAE, "seed=1").code == 0
    before, options = facts_of(mine), ["stage=diffusion", "name=mine", *TINY_DIFFUSION, "trainer.max_steps=3"]
    ended = command(*options, "resume=true", "vae=own/vae/second")
    assert ended.code == 2 and "in vae=own/vae/first, but vae=own/vae/second holds" in ended.err, ended
    assert facts_of(mine) == before
    ended = command(*options, "resume=true", "optimizer.lr=1e-3")
    after = facts_of(mine)
    assert ended.code == 0 and after["finished"] and after["figures"]["steps"] == 3, ended
    assert "optimizer.lr 0.004 -> 0.001; trainer.max_steps 2 -> 3" in ended.out
    assert (after["vae"], after["contract"]) == (before["vae"], before["contract"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["trainer.guard.max_spike=1"], "trainer.guard.max_spike=1 must be above 1"),
        (["trainer.devices=0"], "Choose trainer=cpu"),
        (["logger=wandb", "logger.mode=onlin"], "logger.mode=onlin is unknown"),
        ([], "needs room for"),
    ],
)
def test_a_run_is_deleted_only_for_one_that_can_begin(command, mine, monkeypatch, options, said):
    if not options:
        monkeypatch.setattr("ldm.runs.disk.checkpoint_bytes", lambda _: 1 << 60)
    held = {file: file.read_bytes() for file in sorted(mine.rglob("*")) if file.is_file()}
    ended = command("stage=diffusion", "name=mine", "overwrite=true", *TINY_DIFFUSION, *options)
    assert ended.code == 2 and said in ended.err, ended
    assert {file: file.read_bytes() for file in sorted(mine.rglob("*")) if file.is_file()} == held
