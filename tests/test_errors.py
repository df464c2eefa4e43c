"""Mistakes end in one paragraph that names the remedy, and in exit code 2."""

import errno
import json
from pathlib import Path

import pytest
import torch

import ldm.train
from ldm import console
from ldm.autoencoder.autoencoder import Autoencoder


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty working folder, with a cache of its own."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fails(call, place):
    """Run a command that must fail properly; returns what it says."""

    def fails(main, *arguments) -> str:
        ended = call(main, *arguments)
        assert ended.code == 2, ended
        assert ended.err.startswith("error: ") and ended.err.endswith("\n"), ended.err
        message = ended.err.removeprefix("error: ").rstrip("\n")
        assert "\n" not in message and "Traceback" not in ended.err, ended.err
        print(message)
        return message

    return fails


@pytest.mark.parametrize(
    "args",
    [
        ["network=foo"],
        ["trainer=foo"],
        ["stage=foo"],
        [],
        ["stage=vae", "data=image_folder"],
        ["stage=vae", "data=huggingface"],
        ["stage=vae", "data=image_folder", "data.path=nowhere"],
        ["stage=vae", "data=image_folder", "data.path=."],
        ["stage=vae", "trainer.max_time=5"],
        ["stage=vae", "trainer.max_time=null"],
        ["stage=vae", "trainer.precision=16-mixed", "trainer.max_steps=3"],
        ["stage=vae", "optimizer.decay=foo"],
        ["stage=vae", "trainer.mx_steps=3"],
        ["stage=vae", "sampler=ddim", "sampler.eta=3"],
        ["stage=diffusion"],
        [
            "stage=diffusion",
            "vae=.",
        ],
        [
            "stage=diffusion",
            "vae=no/such",
        ],
        [
            "stage=diffusion",
            "network.nosuch=3",
        ],
        [
            "stage=vae",
            "autoencoder.model.latent_channels=100",
        ],
        [
            "stage=vae",
            "data.resolution=30",
        ],
        [
            "stage=vae",
            "batch_size=3000",
        ],
        [
            "stage=vae",
            "resume=true",
        ],
        [
            "stage=vae",
            "resume=foo.ckpt",
        ],
        [
            "stage=vae",
            "name=a/b",
        ],
        [
            "stage=vae",
            "init_from=.",
        ],
        [
            "stage=vae",
            "stage=diffusion",
        ],
        [
            "stage=vae",
            "data.val_fraction=3",
        ],
        [
            "stage=vae",
            "data.path=3",
        ],
        [
            "stage=vae",
            "batch_size=foo",
        ],
        ["stage=vae", "prompt==(", "seed=(,"],
        ["stage=vae", "trainer=gpu", "trainer.max_steps=3"],
        ["stage=vae", "batch_size=15", "trainer.accumulate_grad_batches=2", "trainer.max_steps=3"],
        ["stage=vae", "trainer.ema_decay=1.5", "trainer.max_steps=3"],
        ["stage=vae", "schedule=rectified_flow", "objective=eps", "trainer.max_steps=3"],
    ],
)
def test_x(call, place, args, capsys):
    import traceback

    try:
        e = call(ldm.train.main, *args)
    except BaseException as x:
        print(args, "RAISED", type(x), x)
        traceback.print_exc()
        return
    print(args, e.code, e.err[:1500])
