"""User errors exit with code 2 and print one paragraph that names the remedy."""

import errno
import json
import re
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

DATA = ["data=image_folder", "data.path=images", "data.resolution=16"]
SHORT_RUN = ["trainer=cpu", "trainer.max_steps=1", "trainer.max_time=null", "trainer.precision=32-true", "batch_size=8"]
VAE = ["stage=vae", *DATA, *SHORT_RUN, "autoencoder.model.block_out_channels=[32]", "logger=csv"]
DIFFUSION = ["stage=diffusion", *DATA, *SHORT_RUN, "conditioning=none", "logger=csv"]


@pytest.fixture(scope="module")
def workdir(make_images, tmp_path_factory) -> Path:
    """Working directory with 40 prepared images that have no captions or classes."""
    workdir = tmp_path_factory.mktemp("workdir")
    make_images(workdir / "images", 40)
    (workdir / "empty").mkdir()
    for resolution in (16, 18):
        prepare(ImageFolder(workdir / "images"), resolution=resolution, cache_dir=workdir / "cache", progress=False)
    return workdir


@pytest.fixture
def run_failing(call, workdir, monkeypatch):
    """Return a function that runs a command, checks that it exits with a user error, and returns the message."""
    monkeypatch.chdir(workdir)
    monkeypatch.setenv("LDM_CACHE", str(workdir / "cache"))

    def run_failing(main, *arguments: str) -> str:
        result = call(main, *arguments)
        assert result.code == 2, result
        *warnings, error = result.err.removesuffix("\n").split("\n")
        assert all(line.startswith("warning: ") for line in warnings) and error.startswith("error: "), result.err
        message = error.removeprefix("error: ")
        assert message and "Traceback" not in message, result.err
        return message

    return run_failing


train = ldm.train.main


USER_ERRORS = [
    ([], ["stage is required", "stage=vae", "stage=diffusion"]),
    ([*VAE, "network=nosuch"], ["network=nosuch", "dit_xl", "unet"]),
    ([*VAE, "trainer.max_stepps=3"], ["no key trainer.max_stepps", "--help"]),
    (["stage=vae", "data=image_folder"], ["data.path", "data.path=..."]),
    ([*VAE, "data.path=nowhere"], ["data.path=nowhere is not a folder", "folder with your images"]),
    ([*VAE, "data.path=empty"], ["data.path=empty", "no images", ".png"]),
    ([*VAE, "batch_size=64"], ["batch_size=64", "images", "batch_size=36 or less"]),
    ([*VAE, "trainer.accumulate_grad_batches=3"], ["batch_size=8", "multiple", "trainer.accumulate_grad_batches=3"]),
    ([*VAE, "data.resolution=18"], ["data.resolution=18", "multiple", "4", "16 or 20"]),
    ([*VAE, "data.resolution=4"], ["data.resolution=4", "at least 6", "SSIM"]),
    (
        [*VAE, "data.resolution=8", "autoencoder=kl_f8", "autoencoder.model.block_out_channels=[32,32,32,32]"],
        ["data.resolution=8", "too small for this autoencoder", "more than 1 value"],
    ),
    ([*VAE, "data.cache_dir=images/000.png"], ["data.cache_dir=images/000.png", "cannot be created", "LDM_CACHE"]),
    ([*VAE, "trainer.max_time=5m"], ["trainer.max_time=5m must be HH:MM:SS", "00:05:00"]),
    ([*VAE, "trainer.max_steps=-1"], ["budget", "trainer.max_steps=N or trainer.max_time=HH:MM:SS"]),
    ([*VAE, "trainer.precision=16-mixed"], ["trainer.precision=16-mixed is unknown", "bf16-mixed, 32-true"]),
    ([*VAE, "trainer.precision=64-true"], ["trainer.precision=64-true is unknown", "auto, bf16-mixed, 32-true"]),
    ([*VAE, "trainer.precision=8"], ["trainer.precision=8 is unknown", "auto, bf16-mixed, 32-true"]),
    ([*VAE, "trainer.guard=true"], ["trainer.guard=True", "null", "max_spike, warmup_steps"]),
    ([*VAE, "+trainer.guard.x=1"], ["trainer.guard", "null", "max_spike"]),
    ([*VAE, "trainer.guard.max_spike=null"], ["trainer.guard.max_spike=null must be a number"]),
    ([*VAE, "trainer.guard.max_spike=abc"], ["trainer.guard.max_spike=abc must be a number"]),
    ([*VAE, "trainer.guard.max_spike=1"], ["trainer.guard.max_spike=1 must be above 1"]),
    ([*VAE, "trainer.guard.warmup_steps=0"], ["trainer.guard.warmup_steps=0 must be"]),
    ([*VAE, "+trainer.x=1"], ["trainer", "unexpected keyword argument 'x'"]),
    ([*VAE, "trainer.strategy=foo"], ["trainer", "invalid strategy name"]),
    ([*VAE, "trainer=fsdp"], ["trainer=fsdp", "trainer=ddp"]),
    ([*VAE, "trainer.strategy=fsdp_cpu_offload"], ["trainer=fsdp", "trainer=ddp"]),
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
    ([*VAE, "autoencoder.model.latent_channels=49"], ["49 latent channels", "48"]),
    ([*VAE, "data.resize=melt"], ["data.resize=melt must be 'crop', 'pad' or 'squash'"]),
    ([*VAE, "name=a/b"], ["name=a/b must be a plain folder name", "runs_dir="]),
    ([*VAE, "init_from=images"], ["images is", "run folder", "diffusers folder"]),
    ([*DIFFUSION], ["finished autoencoder", "python -m ldm.train stage=vae", "vae="]),
    ([*DIFFUSION, "vae=images"], ["images is", "run folder", "diffusers folder"]),
    ([*DIFFUSION, "init_from=images"], ["images is not a pipeline", "stage=diffusion"]),
    ([*DIFFUSION, "conditioning=text"], ["no captions", "conditioning=none"]),
    ([*DIFFUSION, "conditioning=class"], ["no class labels", "folder per class", "conditioning=none"]),
    (
        [*DIFFUSION, "objective.prediction=eps", "schedule=rectified_flow"],
        ["eps", "z_0, v or flow"],
    ),
    ([*DIFFUSION, "objective.loss=heavy"], ["objective", "'heavy'", "simple, min_snr, hybrid, vlb"]),
    ([*DIFFUSION, "variance=learned_range"], ["learned", "Sigma", "hybrid or vlb"]),
    ([*DIFFUSION, "objective=hybrid", "variance=fixed_large"], ["hybrid", "Sigma", "learned_range"]),
    ([*DIFFUSION, "objective=vlb", "objective.timesteps=logit_normal"], ["bias", "uniform or importance"]),
    ([*DIFFUSION, "variance=optimal"], ["optimal", "trained"]),
    ([*DIFFUSION, "sampler=ddpm", "sampler.steps=2000"], ["1 to 1000 steps", "2000"]),
    ([*DIFFUSION, "sampler=ddpm", "sampler.eta=1"], ["There is no key sampler.eta"]),
    ([*DIFFUSION, "sampler=ddim", "sampler.eta=7.0"], ["sampler.eta=7.0 must be 1 or less"]),
    (
        [*DIFFUSION, "sampler=ddpm", "sampler.variance=learned_range"],
        ["sampler.variance=learned_range", "network", "fixed_small"],
    ),
    ([*DIFFUSION, "sampler=ddpm", "sampler.variance=optimal"], ["sampler.variance=optimal", "network", "fixed_small"]),
    ([*DIFFUSION, "sampler=sde", "sampler.steps=3"], ["sampler=", "3 steps"]),
    ([*DIFFUSION, "schedule.num_steps=3", "sampler.steps=2"], ["4 steps", "got 3"]),
]


@pytest.mark.parametrize(
    ("arguments", "parts"), USER_ERRORS, ids=[(arguments or ["no arguments"])[-1] for arguments, _ in USER_ERRORS]
)
def test_message_names_the_option_and_the_remedy(run_failing, arguments, parts):
    message = run_failing(train, *arguments)
    assert all(part in message for part in parts), message


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_is_reported_before_the_run_folder_is_created(run_failing):
    assert "trainer=cpu or trainer=auto" in run_failing(train, *VAE, "trainer=gpu", "name=gpu")
    assert not Path("runs/vae/gpu").exists()


def test_invalid_options_are_rejected_before_images_are_prepared(run_failing, monkeypatch):
    monkeypatch.setattr("ldm.data.images.prepare", lambda *_, **__: pytest.fail("images were prepared"))
    assert "such as 16 or 20" in run_failing(train, *VAE, "data.resolution=18")
    for argument in ("trainer.guard.max_spike=1", "+trainer.x=1", "trainer.devices=foo", "trainer.precision=16"):
        run_failing(train, *VAE, argument)


def test_scientific_notation_is_read_as_an_integer_and_precision_32_as_fp32(call, workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    monkeypatch.setenv("LDM_CACHE", str(workdir / "cache"))
    options = []

    def record(config):
        assert choose_precision(config.trainer.precision, "cpu") == "32-true"
        options.append((config.trainer.max_steps, type(config.trainer.max_steps), config.name))

    monkeypatch.setattr("ldm.training.session.train_stage", record)
    assert call(train, *VAE, "trainer.max_steps=1e1", "name=", "trainer.precision=32").code == 0
    assert options == [(10, int, "")]


def test_unsupported_autoencoder_class_on_the_hub_is_named_in_the_error(run_failing, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "ConsistencyDecoderVAE"}')
    monkeypatch.setattr("ldm.runs.load.hf_hub_download", lambda *_, **__: str(tmp_path / "config.json"))
    message = run_failing(train, *DIFFUSION, "vae=openai/consistency-decoder")
    assert all(part in message for part in ("openai/consistency-decoder", "ConsistencyDecoderVAE", "AutoencoderKL")), (
        message
    )


def test_unreachable_hub_is_explained(run_failing, monkeypatch):
    def raise_offline(name, file, **options):
        raise LocalEntryNotFoundError(f"{name} cannot be reached\nand more lines")

    monkeypatch.setattr("ldm.runs.load.hf_hub_download", raise_offline)
    message = run_failing(train, *DIFFUSION, "vae=stabilityai/nosuch")
    assert "stabilityai/nosuch is not a local folder" in message and "accessible hub id" in message


DISK_FULL_ERRORS = [
    OSError(errno.ENOSPC, "No space left on device", "runs/last.partial"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize(
    ("number", "fault"),
    [
        (errno.EROFS, "read-only"),
        (errno.EIO, "failed"),
        (errno.EFBIG, "maximum file size"),
        (errno.ENAMETOOLONG, "too long"),
    ],
)
def test_disk_fault_is_explained_with_the_path(number, fault):
    message = explain(OSError(number, "reason given by the system", "runs/x"))
    assert fault in message and " at runs/x" in message
    assert fault in explain(SafetensorError(f"I/O error: x (os error {number})"))


@pytest.mark.parametrize("error", DISK_FULL_ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "failing_function", ["lightning.pytorch.Trainer.save_checkpoint", "diffusers.ModelMixin.save_pretrained"]
)
def test_full_disk_during_training_suggests_how_to_resume(run_failing, monkeypatch, failing_function, error):
    def raise_error(*args, **kwargs):
        raise error

    monkeypatch.setattr(failing_function, raise_error)
    message = run_failing(train, *VAE, "name=full", "overwrite=true")
    assert message.startswith("The disk is full") and "resume=true" in message and "runs_dir=" in message


def make_unfinished_run(folder: Path, stage: str, **facts) -> Path:
    """Create a run folder like that of an interrupted training run."""
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
        ("encode", ["images=images", "out=y"]),
        ("forward", ["image=images/000.png"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tools_require_a_finished_run(run_failing, workdir, tool, options):
    assert "Add to the command line: run=..." in run_failing(main, tool, *options)
    assert "run=nowhere does not exist" in run_failing(main, tool, "run=nowhere", *options)
    message = run_failing(main, tool, "run=images", *options)
    assert "run=images is not a run folder" in message and "python -m ldm.train" in message
    make_unfinished_run(workdir / "elsewhere/diffusion/a", "diffusion")
    assert "contains these runs: elsewhere/diffusion/a." in run_failing(main, tool, "run=elsewhere", *options)
    assert "resume=true" in run_failing(main, tool, "run=elsewhere/diffusion/a", *options)
    make_unfinished_run(workdir / "old", "diffusion", format=0)
    assert re.search("format 0.* 1", run_failing(main, tool, "run=old", *options))


def test_sampling_from_an_autoencoder_run_suggests_a_training_command(run_failing, workdir):
    make_unfinished_run(workdir / "vae", "vae")
    message = run_failing(main, "sample", "run=vae")
    assert "vae" in message and "python -m ldm.train stage=diffusion vae=vae" in message


def test_unfinished_autoencoder_is_ignored(run_failing, workdir):
    make_unfinished_run(workdir / "unfinished/vae/a", "vae")
    assert "no finished autoencoder" in run_failing(train, *DIFFUSION, "runs_dir=unfinished")


def test_text_is_rejected_for_a_numeric_option(call):
    result = call(ldm.train.main, "stage=vae", "batch_size=many")
    assert result.code == 2 and "batch_size=many must be a whole number" in result.err
    assert "Traceback" not in result.err


def test_resume_requires_a_name(call):
    result = call(ldm.train.main, "stage=vae", "resume=true")
    assert result.code == 2 and "name=NAME" in result.err and "Traceback" not in result.err
