"""Tests of stock pipelines, with small random models in the layouts of Stable Diffusion 1.5 and 2.1."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import ldm.train
from ldm.autoencoder.autoencoder import Autoencoder, LatentStatistics, published_statistics, weights_sha256
from ldm.autoencoder.identity import IdentityAutoencoder
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.ddpm import DDPM
from ldm.diffusion.samplers.multistep import DPMSolver
from ldm.diffusion.schedule import linear, rectified_flow
from ldm.errors import UserError
from ldm.latents.contract import LatentContract
from ldm.networks.conditioning import NoCondition
from ldm.networks.dit import DiT
from ldm.networks.unet import unet
from ldm.runs.load import load_pipeline
from ldm.runs.run import Run
from ldm.runtime.random import sample_generators
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.stock import fold_standardisation, save_stock, to_stock
from tests.export.hub_stand_in import hub_stand_in

PARTS = ("vae", "unet", "text_encoder")
SCHEDULERS = {DDIMScheduler: DDIM, DPMSolverMultistepScheduler: DPMSolver}
PROMPTS = ["red", "green red"]


def write_stable_diffusion(folder: Path, *, version: int = 1) -> Path:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=0.18215,
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2 if version == 1 else (1, 2),
        use_linear_projection=version == 2,
    )
    for part in (vae, unet):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    words = ["<|startoftext|>", "<|endoftext|>", "r", "e", "d", "g", "n", "r</w>", "e</w>", "d</w>", "n</w>", "re"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate([*words, "red</w>"])}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    padding = {} if version == 1 else {"pad_token": "!"}
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    prediction = "epsilon" if version == 1 else "v_prediction"
    chain = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": prediction}
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**sizes, **tokens, max_position_embeddings=77)),
        tokenizer=CLIPTokenizer(**files, **padding, model_max_length=77),
        unet=unet,
        scheduler=DDIMScheduler(**chain, steps_offset=1, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[1, 2])
def stable_diffusion(request, tmp_path_factory) -> Path:
    return write_stable_diffusion(tmp_path_factory.mktemp("sd") / f"v{request.param}", version=request.param)


def largest_difference(stock: DiffusionPipeline, pipeline: LatentDiffusion, scheduler: type, steps: int) -> float:
    """Return the largest difference of pixels in [0, 255] between a stock pipeline and ldm."""
    options = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 0}
    stock.scheduler = scheduler.from_config(stock.scheduler.config, **options)
    stock.set_progress_bar_config(disable=True)
    condition, _ = pipeline.conditioning.for_request(PROMPTS)
    z = pipeline.sample(SCHEDULERS[scheduler](steps), condition, sample_generators(0, range(2)), guidance=3.0)
    expected = pipeline.decode(z) / 2 + 0.5
    noise = torch.stack([torch.randn(pipeline.latent_shape, generator=g) for g in sample_generators(0, range(2))])
    images = stock(PROMPTS, latents=noise, num_inference_steps=steps, guidance_scale=3.0, output_type="pt").images
    assert images.shape == expected.shape and images.std() > 0.05, "the images must not be blank"
    return 255 * (images - expected).abs().max().item()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_stable_diffusion_draws_the_same_images_in_ldm(stable_diffusion, scheduler):
    stock = StableDiffusionPipeline.from_pretrained(stable_diffusion)
    assert largest_difference(stock, load_pipeline(str(stable_diffusion)), scheduler, 20) < 1


def test_standardisation_is_folded_into_the_autoencoder(stable_diffusion):
    autoencoder = Autoencoder.load(stable_diffusion / "vae")
    statistics = [0.5, -0.2, 0.0, 3.0], [2.0, 0.7, 1.0, 4.0]
    autoencoder.statistics = LatentStatistics(*statistics, [0.1] * 3, "images", autoencoder.weights_sha256())
    folded = fold_standardisation(autoencoder)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, log_variance = autoencoder.encode(images)
    with torch.no_grad():
        posterior = folded.encode(images).latent_dist
        torch.testing.assert_close(posterior.mean, autoencoder.standardise(mean), rtol=1e-4, atol=1e-5)
        std = torch.tensor(statistics[1])[:, None, None]
        torch.testing.assert_close(posterior.std, (0.5 * log_variance).exp() / std, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            folded.decode(posterior.mean).sample.clamp(-1, 1), autoencoder.decode(mean), rtol=1e-4, atol=1e-4
        )
    assert folded.config.scaling_factor == 1 and published_statistics(folded) == ([0.0] * 4, [1.0] * 4)


@pytest.fixture
def train(make_images, tmp_path, monkeypatch, call):
    """Function that trains on the latents of 12 captioned images in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    make_images(tmp_path / "images", 12, size=32)
    for path in (tmp_path / "images").glob("*.png"):
        path.with_suffix(".txt").write_text("red")
    options = ["data=image_folder", "data.path=images", "data.resolution=32", "data.val_fraction=0.2", "batch_size=4"]
    options += ["trainer=cpu", "trainer.max_time=null", "trainer.precision=32-true", "trainer.checkpoint_every_s=0"]

    def train(*arguments: str):
        return call(ldm.train.main, "stage=diffusion", *options, "logger=csv", "val_images=2", *arguments)

    return train


def test_training_continues_from_stable_diffusion(stable_diffusion, train):
    """Two steps change only the UNet, and the result opens in diffusers."""
    prediction = "eps" if stable_diffusion.name == "v1" else "v"
    start = ["experiment=stable_diffusion", f"init_from={stable_diffusion}", f"objective.prediction={prediction}"]
    assert train(*start, "name=whole", "trainer.max_steps=2", "data.resolution=32").code == 0
    whole = Run.open("runs/diffusion/whole").pipeline()
    save_stock(whole, Path("stock"))
    original, stock = (StableDiffusionPipeline.from_pretrained(path) for path in (stable_diffusion, "stock"))
    changed = {
        part for part in PARTS if weights_sha256(getattr(original, part)) != weights_sha256(getattr(stock, part))
    }
    assert changed == {"unet", "vae"}, "the vae differs by the folded statistics"
    assert whole.autoencoder.weights_sha256() == weights_sha256(original.vae)
    assert largest_difference(stock, whole, DDIMScheduler, 10) < 1
    assert largest_difference(stock, whole, DPMSolverMultistepScheduler, 20) < 1
    contract = json.loads(Path("stock/contract.json").read_text())
    assert contract["autoencoder_sha256"] == weights_sha256(original.vae)
    assert contract["folded_autoencoder_sha256"] == weights_sha256(stock.vae)


def test_training_from_stable_diffusion_resumes_exactly(tmp_path_factory, train):
    folder = write_stable_diffusion(tmp_path_factory.mktemp("sd") / "v1")
    start = ["experiment=stable_diffusion", f"init_from={folder}", "data.resolution=32"]
    assert train(*start, "name=whole", "trainer.max_steps=2").code == 0
    assert train(*start, "name=parts", "trainer.max_steps=1").code == 0
    resumed = train(*start, "name=parts", "trainer.max_steps=2", "resume=true")
    assert resumed.code == 0 and "resumed from" in resumed.out, resumed
    whole, parts = (Run.open(f"runs/diffusion/{name}").pipeline() for name in ("whole", "parts"))
    assert weights_sha256(whole.network) == weights_sha256(parts.network)
    save_stock(whole, Path("stock"))
    again = ["experiment=stable_diffusion", "init_from=stock", "data.resolution=32", "name=again"]
    assert train(*again, "trainer.max_steps=1").code == 0, "training can start from its own result"


def test_training_starts_from_the_id_of_stable_diffusion_on_the_hub(tmp_path, train, monkeypatch):
    folder = write_stable_diffusion(tmp_path / "sd")
    with hub_stand_in() as hub:
        hub.use(monkeypatch, tmp_path / "hub")
        paths = [path for path in folder.rglob("*") if path.is_file()]
        hub.files["someone/sd"] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        hub.files["someone/sd"]["unet/diffusion_pytorch_model.fp16.safetensors"] = b"not downloaded"
        options = ["experiment=stable_diffusion", "init_from=someone/sd", "data.resolution=32", "trainer.max_steps=1"]
        result = train(*options, "name=hub")
        assert result.code == 0, result
        assert not list((tmp_path / "hub").rglob("*.fp16.*"))
        conditioning = Run.open("runs/diffusion/hub").pipeline().conditioning
        assert conditioning.state()["encoder"] == "someone/sd"
        for wrong, message in (
            ("conditioning=text", "network=unet_sd and conditioning=clip_sd"),
            ("init_from=someone/other", "someone/other is not a local folder"),
        ):
            result = train(*options, wrong, "name=wrong")
            assert result.code == 2 and re.search(message, result.err), result
    plain = ["network=unet_demo", "conditioning=text", f"conditioning.encoder={folder}", f"vae={folder}"]
    result = train(f"init_from={folder}", *plain, "schedule=scaled_linear", "trainer.max_steps=1", "name=plain")
    assert result.code == 2 and "Use conditioning=clip_sd" in result.err, result


def test_stable_diffusion_network_can_be_trained_from_scratch(tmp_path_factory, train):
    folder = write_stable_diffusion(tmp_path_factory.mktemp("sd") / "v1")
    sizes = ["network.block_out_channels=[8,16]", "network.layers_per_block=1", "network.norm_num_groups=4"]
    network = ["network=unet_sd", *sizes, "network.num_heads=2", "conditioning=clip_sd", f"vae={folder}"]
    assert train(*network, f"conditioning.encoder={folder}", "name=new", "trainer.max_steps=1").code == 0
    pipeline = Run.open("runs/diffusion/new").pipeline()
    assert pipeline.conditioning.for_request(["red"])[0].keys() == {"tokens"} and pipeline.prediction == "v"
    assert isinstance(to_stock(pipeline), StableDiffusionPipeline)
    result = train("network=unet_sd", f"vae={folder}", "name=other", "trainer.max_steps=1")
    assert result.code == 2 and "network=unet_sd and conditioning=clip_sd" in result.err


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("scheduler/scheduler_config.json", {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule=squaredcos_cap_v2"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        ("scheduler/scheduler_config.json", {"beta_end": -1.0}, "no valid noise schedule"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type|valid StableDiffusionUNet"),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "no pipelines of other programs"),
    ],
)
def test_other_pipelines_are_refused(tmp_path, file, change, message):
    folder = write_stable_diffusion(tmp_path / "sd")
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_pipeline(str(folder))


def pixel_pipeline(std: float = 1.0, **options) -> LatentDiffusion:
    torch.manual_seed(0)
    model = IdentityAutoencoder()
    autoencoder = Autoencoder(model)
    digest = autoencoder.weights_sha256()
    autoencoder.statistics = LatentStatistics([0.0] * 3, [std] * 3, [0.1] * 3, "images", digest)
    network = unet(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        attention_levels=(),
        head_dim=8,
        norm_num_groups=4,
        layers_per_block=1,
    )
    parts = {"network": network.eval(), "schedule": linear(40), "prediction": "eps", **options}
    contract = LatentContract(digest, "images", 8, 1, 3, 0.05, False)
    return LatentDiffusion(
        autoencoder=autoencoder, conditioning=NoCondition(), contract=contract, latent_shape=(3, 8, 8), **parts
    )


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_ddpm_pipeline_draws_the_same_images(tmp_path, prediction):
    pipeline = pixel_pipeline(prediction=prediction)
    save_stock(pipeline, tmp_path)
    stock = DDPMPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    (generator,) = sample_generators(0, range(1))
    images = stock(generator=generator, num_inference_steps=40, output_type="np").images
    expected = pipeline.decode(pipeline.sample(DDPM(40), {}, sample_generators(0, range(1)))) / 2 + 0.5
    assert (255 * (torch.from_numpy(images).permute(0, 3, 1, 2) - expected)).abs().max() < 1 and images.std() > 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"std": 0.5}, "latent_statistics=published"),
        ({"prediction": "flow", "schedule": rectified_flow(40)}, "objective.prediction=eps schedule=linear"),
        ({"prediction": "v", "schedule": rectified_flow(40)}, "schedule=linear"),
        (
            {"network": DiT(sample_size=8, in_channels=3, out_channels=3, hidden_dim=16, depth=1, head_dim=8)},
            "network=unet",
        ),
    ],
)
def test_models_that_fit_no_stock_pipeline_are_refused(options, message):
    with pytest.raises(UserError, match=f"DDPMPipeline.* vae=identity {message}\\. .*format=native"):
        to_stock(pixel_pipeline(**options))
