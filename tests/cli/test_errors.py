"""Mistakes of the user's end in one paragraph that names the remedy, and in exit code 2."""

import errno
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError

import ldm.train
from ldm.cli.explain import explain
from ldm.cli.main import main
from ldm.data.images import prepare
from ldm.data.sources.image_folder import ImageFolder
from ldm.training.optim.precision import choose_precision

MINE = ["data=image_folder", "data.path=pictures", "data.resolution=16"]
SHORT = ["trainer=cpu", "trainer.max_steps=1", "trainer.max_time=null", "trainer.precision=32-true", "batch_size=8"]
VAE = ["stage=vae", *MINE, *SHORT, "autoencoder.model.block_out_channels=[32]", "logger=csv"]
DIFFUSION = ["stage=diffusion", *MINE, *SHORT, "conditioning=none", "logger=csv"]


@pytest.fixture(scope="module")
def place(make_images, tmp_path_factory) -> Path:
    """A working folder with forty pictures without captions or classes, prepared."""
    place = tmp_path_factory.mktemp("place")
    make_images(place / "pictures", 40)
    (place / "empty").mkdir()
    for resolution in (16, 18):
        prepare(ImageFolder(place / "pictures"), resolution=resolution, cache_dir=place / "cache", progress=False)
    return place


@pytest.fixture
def fails(call, place, monkeypatch):
    """Run a command that must fail as a user is meant to see it; returns what it says."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("LDM_CACHE", str(place / "cache"))

    def fails(main, *arguments: str) -> str:
        ended = call(main, *arguments)
        assert ended.code == 2, ended
        *warnings, last = ended.err.removesuffix("\n").split("\n")
        assert all(line.startswith("warning: ") for line in warnings) and last.startswith("error: "), ended.err
        message = last.removeprefix("error: ")
        assert message and "Traceback" not in message, ended.err
        return message

    return fails


train = ldm.train.main


MISTAKES = [
    ([], ["stage is required", "stage=vae", "stage=diffusion"]),
    ([*VAE, "network=nosuch"], ["network=nosuch", "dit_xl", "unet"]),
    ([*VAE, "trainer.max_stepps=3"], ["no key trainer.max_stepps", "--help"]),
    (["stage=vae", "data=image_folder"], ["data.path", "data.path=..."]),
    ([*VAE, "data.path=nowhere"], ["data.path=nowhere is not a folder", "Name the folder"]),
    ([*VAE, "data.path=empty"], ["data.path=empty holds no images", ".png"]),
    ([*VAE, "batch_size=64"], ["fewer than batch_size=64", "Choose batch_size="]),
    ([*VAE, "trainer.accumulate_grad_batches=3"], ["batch_size=8 must be a multiple of", "=3"]),
    ([*VAE, "data.resolution=18"], ["data.resolution=18 must be a multiple of f = 4", "16 or 20"]),
    ([*VAE, "trainer.max_time=5m"], ["trainer.max_time=5m must be HH:MM:SS", "00:05:00"]),
    ([*VAE, "trainer.max_steps=-1"], ["needs a budget", "trainer.max_steps=N or trainer.max_time=HH:MM:SS"]),
    ([*VAE, "trainer.precision=16-mixed"], ["trainer.precision=16-mixed is unknown", "bf16-mixed, 32-true"]),
    ([*VAE, "trainer.precision=64-true"], ["trainer.precision=64-true is unknown", "auto, bf16-mixed, 32-true"]),
    ([*VAE, "trainer.precision=8"], ["trainer.precision=8 is unknown", "auto, bf16-mixed, 32-true"]),
    ([*VAE, "trainer.guard=true"], ["trainer.guard=True must be null", "max_spike, warmup_steps"]),
    ([*VAE, "+trainer.guard.x=1"], ["must be null, or hold none but: max_spike"]),
    ([*VAE, "trainer.guard.max_spike=null"], ["trainer.guard.max_spike=null must be a number"]),
    ([*VAE, "trainer.guard.max_spike=abc"], ["trainer.guard.max_spike=abc must be a number"]),
    ([*VAE, "trainer.guard.max_spike=1"], ["trainer.guard.max_spike=1 must be above 1"]),
    ([*VAE, "trainer.guard.warmup_steps=0"], ["trainer.guard.warmup_steps=0 must be"]),
    ([*VAE, "+trainer.x=1"], ["No trainer can be made", "unexpected keyword argument 'x'"]),
    ([*VAE, "trainer.strategy=foo"], ["No trainer can be made", "invalid strategy name"]),
    ([*VAE, "trainer=fsdp"], ["trainer=fsdp does not work yet: use trainer=ddp"]),
    ([*VAE, "trainer.strategy=fsdp_cpu_offload"], ["trainer=fsdp does not work yet: use trainer=ddp"]),
    ([*VAE, "trainer.accelerator=foo"], ["invalid accelerator name", "cpu"]),
    ([*VAE, "trainer.devices=foo"], ["`devices`", "trainer=cpu"]),
    ([*VAE, "~trainer.guard"], ["Training needs trainer.guard"]),
    ([*VAE, "trainer.max_steps=1.5"], ["trainer.max_steps=1.5 must be a whole number"]),
    (
        [*VAE, "adversarial=hinge", "adversarial.layers=1" + "0" * 30],
        ["adversarial.layers=1000", "64 or less"],
    ),
    ([*VAE, "runs_dir="], ["runs_dir= must not be empty"]),
    ([*VAE, "name=a\nb"], ["name=a\\nb must be a plain folder name"]),
    ([*VAE, "name=\x1b[2J\u202ea/b"], ["name=\\x1b[2J\\u202ea/b must be"]),
    ([*VAE, "optimizer.decay=sudden"], ["optimizer.decay=sudden is unknown", "linear, cosine, constant"]),
    ([*VAE, "trainer.ema_decay=1.5", "name=ema"], ["trainer.ema_decay=1.5 must be below 1"]),
    ([*VAE, "autoencoder.model.latent_channels=49"], ["49 latent channels exceed the 48 dimensions"]),
    ([*VAE, "data.resize=melt"], ["data.resize=melt must be 'crop', 'pad' or 'squash'"]),
    ([*VAE, "name=a/b"], ["name=a/b must be a plain folder name", "runs_dir="]),
    ([*VAE, "init_from=pictures"], ["pictures is neither a run folder nor a diffusers folder"]),
    ([*DIFFUSION], ["no finished autoencoder", "python -m ldm.train stage=vae", "vae="]),
    ([*DIFFUSION, "vae=pictures"], ["pictures is neither a run folder nor a diffusers folder"]),
    ([*DIFFUSION, "init_from=pictures"], ["pictures is no pipeline", "stage=diffusion"]),
    ([*DIFFUSION, "conditioning=text"], ["have no captions", "conditioning=none"]),
    ([*DIFFUSION, "conditioning=class"], ["have no class labels", "one folder per class", "conditioning=none"]),
    (
        [*DIFFUSION, "objective.prediction=eps", "schedule=rectified_flow"],
        ["eps does not determine z_0", "z_0, v or flow"],
    ),
    ([*DIFFUSION, "objective.loss=heavy"], ["unknown objective 'heavy'", "simple, min_snr, hybrid, vlb"]),
    ([*DIFFUSION, "variance=learned_range"], ["would leave the learned Sigma untrained", "choose hybrid or vlb"]),
    ([*DIFFUSION, "objective=hybrid", "variance=fixed_large"], ["trains Sigma alone", "choose variance learned_range"]),
    ([*DIFFUSION, "objective=vlb", "objective.timesteps=logit_normal"], ["would bias", "uniform or importance"]),
    ([*DIFFUSION, "variance=optimal"], ["fitted to a trained denoiser"]),
    ([*DIFFUSION, "sampler=ddpm", "sampler.steps=2000"], ["1 to 1000 steps; got 2000"]),
    ([*DIFFUSION, "sampler=ddpm", "sampler.eta=1"], ["There is no key sampler.eta"]),
    ([*DIFFUSION, "sampler=ddim", "sampler.eta=7.0"], ["sampler.eta=7.0 must be 1 or less"]),
    ([*DIFFUSION, "sampler=ddpm", "sampler.variance=learned_range"], ["learned_range is none of this network"]),
    ([*DIFFUSION, "sampler=ddpm", "sampler.variance=optimal"], ["optimal is none of this network"]),
    ([*DIFFUSION, "sampler=sde", "sampler.steps=3"], ["sampler= do not go together"]),
    ([*DIFFUSION, "schedule.num_steps=3", "sampler.steps=2"], ["a chain needs 4 steps at least; got 3"]),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES, ids=[(given or ["nothing"])[-1] for given, _ in MISTAKES])
def test_training(fails, arguments, said):
    message = fails(train, *arguments)
    assert all(part in message for part in said), message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here(fails):
    assert "trainer=cpu or trainer=auto" in fails(train, *VAE, "trainer=gpu", "name=gpu")
    assert not Path("runs/vae/gpu").exists(), "a name is not taken by a run that never began"


def test_what_does_not_fit_is_refused_before_the_images_are_read(fails, monkeypatch):
    monkeypatch.setattr("ldm.data.images.prepare", lambda *_, **__: pytest.fail("prepared first"))
    assert "such as 16 or 20" in fails(train, *VAE, "data.resolution=18")
    for argument in ("trainer.guard.max_spike=1", "+trainer.x=1", "trainer.devices=foo", "trainer.precision=16"):
        fails(train, *VAE, argument)


def test_numbers_that_mean_whole_ones(call, place, monkeypatch):
    """1e1 steps are ten, and 32 is fp32."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("LDM_CACHE", str(place / "cache"))
    seen = []

    def look(config):
        assert choose_precision(config.trainer.precision, "cpu") == "32-true"
        seen.append((config.trainer.max_steps, type(config.trainer.max_steps), config.name))

    monkeypatch.setattr("ldm.training.session.train_stage", look)
    assert call(train, *VAE, "trainer.max_steps=1e1", "name=", "trainer.precision=32").code == 0
    assert seen == [(10, int, "")]


def test_a_hub_whose_model_is_of_another_kind(fails, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    monkeypatch.setattr("ldm.runs.load.hf_hub_download", lambda *_, **__: str(tmp_path / "config.json"))
    assert "it holds a AutoencoderTiny, not one of AutoencoderKL" in fails(train, *DIFFUSION, "vae=madebyollin/taesd")


def test_a_hub_that_cannot_be_reached(fails, monkeypatch):
    def offline(name, file, **options):
        raise LocalEntryNotFoundError(f"{name} cannot be reached\nand more lines")

    monkeypatch.setattr("ldm.runs.load.hf_hub_download", offline)
    message = fails(train, *DIFFUSION, "vae=stabilityai/nosuch")
    assert "stabilityai/nosuch is no folder here" in message and "hub id that can be reached" in message


FULL = [
    OSError(errno.ENOSPC, "No space left on device", "runs/last.partial"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EROFS, "The disk is read-only at runs/x"),
        (errno.EIO, "The disk failed to read or write at runs/x"),
        (errno.EFBIG, "A file grew larger than is allowed at runs/x"),
        (errno.ENAMETOOLONG, "A name or a path is longer than the disk allows at runs/x"),
    ],
)
def test_a_disk_with_a_fault(number, said):
    message = explain(OSError(number, "told by the system", "runs/x"))
    assert message.startswith(said)
    assert explain(SafetensorError(f"I/O error: x (os error {number})")).startswith(said.removesuffix(" at runs/x"))


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "culprit", ["lightning.pytorch.Trainer.save_checkpoint", "diffusers.ModelMixin.save_pretrained"]
)
def test_a_full_disk(fails, monkeypatch, culprit, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(culprit, full)
    message = fails(train, *VAE, "name=full", "overwrite=true")
    assert message.startswith("The disk is full") and "resume=true" in message and "runs_dir=" in message


def pretend(folder: Path, stage: str, **facts) -> Path:
    """A run folder as training leaves it when it is stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": 1, "stage": stage, "finished": None, "data_fingerprint": "x", **facts}
    (folder / "run.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("tool", "options"),
    [
        ("sample", []),
        ("evaluate", []),
        ("decode", ["latents=x", "out=y"]),
        ("encode", ["images=pictures", "out=y"]),
        ("forward", ["image=pictures/000.png"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tools_want_a_run(fails, place, tool, options):
    assert "Add to the command line: run=..." in fails(main, tool, *options)
    assert "run=nowhere does not exist" in fails(main, tool, "run=nowhere", *options)
    message = fails(main, tool, "run=pictures", *options)
    assert "run=pictures is not a run folder" in message and "python -m ldm.train" in message
    pretend(place / "elsewhere/diffusion/a", "diffusion")
    assert "Runs below it: elsewhere/diffusion/a." in fails(main, tool, "run=elsewhere", *options)
    assert "resume=true" in fails(main, tool, "run=elsewhere/diffusion/a", *options)
    pretend(place / "old", "diffusion", format=0)
    assert "has format 0; this version reads 1" in fails(main, tool, "run=old", *options)


def test_an_autoencoder_cannot_draw(fails, place):
    pretend(place / "vae", "vae")
    message = fails(main, "sample", "run=vae")
    assert "run of stage vae" in message and "python -m ldm.train stage=diffusion vae=vae" in message


def test_an_unfinished_autoencoder_is_not_found(fails, place):
    pretend(place / "unfinished/vae/a", "vae")
    assert "no finished autoencoder" in fails(train, *DIFFUSION, "runs_dir=unfinished")


def test_a_number_that_is_none(call):
    ended = call(ldm.train.main, "stage=vae", "batch_size=many")
    assert ended.code == 2 and "batch_size=many must be a whole number" in ended.err
    assert "Traceback" not in ended.err


def test_resume_without_a_name(call):
    ended = call(ldm.train.main, "stage=vae", "resume=true")
    assert ended.code == 2 and "name=NAME" in ended.err and "Traceback" not in ended.err
