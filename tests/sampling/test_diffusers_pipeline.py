"""Pipeline folders opened by diffusers without ldm draw the same images as ldm, and saving and arguments work."""

import itertools
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, VQModel
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizerFast

from ldm.autoencoder.autoencoder import Autoencoder, LatentStatistics
from ldm.autoencoder.identity import IdentityAutoencoder
from ldm.autoencoder.patch import PatchAutoencoderKL
from ldm.autoencoder.sampling_decoder import SamplingDecoder
from ldm.diffusion import schedule
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.ddpm import DDPM
from ldm.diffusion.samplers.multistep import DPMSolver, UniPC
from ldm.latents.contract import LatentContract
from ldm.networks.conditioning import ClassCondition, NoCondition, TextCondition
from ldm.networks.dit import DiT
from ldm.networks.unet import unet
from ldm.runtime.random import sample_generators
from ldm.sampling.diffusers_pipeline import SCHEDULERS, portable_code
from ldm.sampling.draw import draw_batches, draw_images
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.request import Request
from tests.export.hub_stand_in import COMMIT, hub_stand_in

ROOT = Path(__file__).parents[2]
SAMPLERS = {
    "DDPMScheduler": DDPM,
    "DDIMScheduler": DDIM,
    "DPMSolverMultistepScheduler": DPMSolver,
    "UniPCMultistepScheduler": UniPC,
}
NETWORKS, CONDITIONS = ("unet", "dit"), ("text", "class", "none")
AUTOENCODERS = ("patch_kl", "kl", "vq", "identity")
CHAINS = (
    ("linear", "v", "fixed_small"),
    ("cosine", "z_0", "learned_range"),
    ("rectified_flow", "flow", "fixed_small"),
    ("scaled_linear", "eps", "fixed_large"),
    ("rectified_flow", "v", "learned_range"),
)
NUM_STEPS = 60  # not a multiple of 50
PROMPTS = ["red", "green red"]


def randomise(module: torch.nn.Module, std: float) -> torch.nn.Module:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module.eval()


def build_autoencoder(kind: str) -> Autoencoder:
    sizes = {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 3}
    if kind == "identity":
        model: torch.nn.Module = IdentityAutoencoder()
    elif kind == "patch_kl":
        model = randomise(PatchAutoencoderKL(patch=2, **sizes), 0.2)
        model.sampling_decoder = SamplingDecoder(model, [1.0] * 3)
        randomise(model.sampling_decoder, 0.2).level.fill_(0.7)
    else:
        options = {"num_vq_embeddings": 16} if kind == "vq" else {}
        model = randomise((VQModel if kind == "vq" else AutoencoderKL)(**sizes, **options), 0.2)
    autoencoder = Autoencoder(model)
    digest = autoencoder.weights_sha256()
    autoencoder.statistics = LatentStatistics([0.1, 0.0, -0.1], [0.9, 1.1, 1.0], [0.1] * 3, "images", digest)
    return autoencoder


def build(
    network: str, condition: str, autoencoder: str, chain: tuple[str, str, str], encoder: Path
) -> LatentDiffusion:
    """Build a pipeline with random weights and latents of 8 x 8."""
    torch.manual_seed(0)
    model, (name, prediction, variance) = build_autoencoder(autoencoder), chain
    conditions = {"text": lambda: TextCondition(str(encoder), 5), "class": lambda: ClassCondition(["cat", "1"])}
    conditioning = conditions.get(condition, NoCondition)()
    sizes = {"sample_size": 8, "in_channels": 3, "out_channels": 6 if variance == "learned_range" else 3}
    sizes |= {"head_dim": 8, **conditioning.network_options()}
    if network == "dit":
        net = DiT(**sizes, hidden_dim=16, depth=2)
    else:
        net = unet(**sizes, block_out_channels=(8, 16), attention_levels=(1,), norm_num_groups=4, layers_per_block=1)
    return LatentDiffusion(
        network=randomise(net, 0.1),
        autoencoder=model,
        schedule=getattr(schedule, name)(NUM_STEPS),
        prediction=prediction,
        conditioning=conditioning,
        contract=LatentContract(model.weights_sha256(), "images", 8 * model.factor, model.factor, 3, 0.05, False),
        latent_shape=(3, 8, 8),
        variance=variance,
    )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder


def request_and_arguments(pipeline: LatentDiffusion) -> tuple[Request, dict]:
    """Return the same request for ldm and for diffusers."""
    kind = pipeline.conditioning.kind
    if kind == "text":
        return Request(*pipeline.conditioning.for_request(PROMPTS)), {"prompt": PROMPTS}
    if kind == "class":
        return Request(*pipeline.conditioning.for_request(classes=["cat", 1])), {"class_labels": ["cat", 1]}
    return Request.from_options(pipeline, num_samples=2), {"num_images_per_prompt": 2}


def compare(
    pipelines: list[LatentDiffusion], steps: tuple[int, ...], folder: Path, python: str = sys.executable
) -> dict[str, float]:
    """Return the largest difference of pixels in [0, 255] between ldm and diffusers without ldm, for each scheduler.

    All pipelines are opened in one process, of the interpreter `python`.
    """
    requests, expected = [], []
    for number, pipeline in enumerate(pipelines):
        pipeline.save(folder / f"{number}")
        request, arguments = request_and_arguments(pipeline)
        for scheduler, count in itertools.product(SAMPLERS, steps):
            options = {"guidance": 2.0, "seed": number}
            sampler = SAMPLERS[scheduler](count)
            expected.append((scheduler, torch.cat(list(draw_batches(pipeline, request, sampler, **options)))))
            arguments = {**arguments, "num_inference_steps": count, "guidance_scale": 2.0}
            seeds = [generator.initial_seed() for generator in sample_generators(number, range(2))]
            out = str(folder / f"{len(expected)}.safetensors")
            content = {"scheduler": scheduler, "arguments": arguments, "seeds": seeds, "out": out}
            requests.append({"folder": str(folder / f"{number}"), **content})
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    program = Path(__file__).with_name("open_without_ldm.py")
    subprocess.run(
        [python, str(program)], input=json.dumps(requests), env=environment, cwd=folder, text=True, check=True
    )
    differences: dict[str, float] = {}
    for (scheduler, images), content in zip(expected, requests, strict=True):
        drawn, images = load_file(content["out"])["images"], images / 2 + 0.5
        assert drawn.shape == images.shape and images.std() > 0.05, "the images must not be blank"
        difference = 255 * (drawn - images).abs().max().item()
        differences[scheduler] = max(difference, differences.get(scheduler, 0.0))
    return differences


def test_diffusers_draws_the_same_images_without_ldm(tmp_path, encoder):
    """One of each network, condition, autoencoder and chain; all combinations are a slow test."""
    combinations = [
        ("unet", "text", "patch_kl", CHAINS[0]),
        ("dit", "text", "kl", CHAINS[1]),
        ("unet", "class", "vq", CHAINS[2]),
        ("dit", "none", "identity", CHAINS[3]),
        ("unet", "none", "patch_kl", CHAINS[4]),
    ]
    pipelines = [build(*combination, encoder) for combination in combinations]
    differences = compare(pipelines, (7,), tmp_path)
    assert differences.keys() == SAMPLERS.keys() and max(differences.values()) < 1, differences


@pytest.mark.slow
def test_diffusers_draws_the_same_images_without_ldm_for_all_combinations(tmp_path, encoder):
    kinds = [*itertools.product(NETWORKS, CONDITIONS, AUTOENCODERS)]
    combinations = [(*kind, CHAINS[i % len(CHAINS)]) for i, kind in enumerate(kinds)]
    combinations += [(*kind, CHAINS[(i + 2) % len(CHAINS)]) for i, kind in enumerate(kinds[::2])]
    assert len(combinations) >= 32
    pipelines = [build(*combination, encoder) for combination in combinations]
    differences = compare(pipelines, (10, 20, 50), tmp_path, environment_without_ldm(tmp_path / "environment"))
    assert max(differences.values()) < 1, differences


def environment_without_ldm(folder: Path) -> str:
    """Create a virtual environment with the packages of this one, but without ldm. Return its interpreter."""
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/*/site-packages")
    # Python does not process the .pth files in a folder that was added by one, such as that of an editable install
    (packages / "packages.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    python = str(folder / "bin" / "python")
    options = {"capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": ""}, "cwd": folder}
    result = subprocess.run([python, "-c", "import diffusers, torch; import ldm"], **options)
    assert "No module named 'ldm'" in result.stderr, result.stderr
    return python


@pytest.fixture
def trained(encoder) -> LatentDiffusion:
    return build("unet", "text", "patch_kl", CHAINS[0], encoder)


@pytest.fixture
def pipeline(trained) -> DiffusionPipeline:
    pipeline = trained.to_diffusers()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: DiffusionPipeline, seed: int = 0, **arguments) -> torch.Tensor:
    options = {"prompt": "red", "num_inference_steps": 4, "output_type": "pt", **arguments}
    return pipeline(generator=torch.Generator().manual_seed(seed), **options).images


def test_text_encoder_can_be_loaded_from_the_hub_at_its_revision(encoder, tmp_path, monkeypatch):
    with hub_stand_in() as hub:
        hub.use(monkeypatch, tmp_path / "hub")
        hub.files["someone/encoder"] = {path.name: path.read_bytes() for path in encoder.iterdir()}
        trained = build("unet", "text", "patch_kl", CHAINS[0], Path("someone/encoder"))
        trained.save(tmp_path / "small", with_text_encoder=False)
        trained.save(tmp_path / "whole")
        assert not (tmp_path / "small/text_encoder").exists() and (tmp_path / "whole/text_encoder").exists()
        settings = json.loads((tmp_path / "small/model_index.json").read_text())["settings"]
        assert settings["conditioning"]["revision"] == COMMIT
        (expected,) = draw_images(trained, prompts=["red"], guidance=2.0)
        monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.syspath_prepend(str(tmp_path / "modules"))
        for name in ("small", "whole"):
            assert draw_images(LatentDiffusion.load(tmp_path / name), prompts=["red"], guidance=2.0)[0] == expected
            opened = DiffusionPipeline.from_pretrained(tmp_path / name, trust_remote_code=True)
            opened.set_progress_bar_config(disable=True)
            image = draw(opened, guidance_scale=2.0, num_inference_steps=20, output_type="pil")[0]
            assert image.tobytes() == expected.tobytes()


def test_code_in_the_folder_is_the_code_of_the_package(trained, tmp_path):
    """Each copy is a single file, with the source of a module in place of each import from the package."""
    trained.save(tmp_path)
    files = {path.name.removeprefix("ldm_").rpartition("_")[0]: path for path in tmp_path.rglob("*.py")}
    inlined = {"diffusers_pipeline": ("diffusion/portable", "networks/text_embedding"), "unet": (), "patch": ()}
    folders = {"diffusers_pipeline": "sampling", "unet": "networks", "patch": "autoencoder"}
    assert files.keys() == inlined.keys()
    for name, modules in inlined.items():
        expected = (ROOT / "ldm" / folders[name] / f"{name}.py").read_text()
        for module in modules:
            source = (ROOT / "ldm" / f"{module}.py").read_text().rstrip()
            expected, count = re.subn(
                rf"from ldm\.{module.replace('/', '.')} import .*", lambda _, x=source: x, expected
            )
            assert count == 1
        assert files[name].read_text() == expected and not re.search(r"^(from|import) ldm", expected, re.MULTILINE)


def test_copies_in_a_new_folder_are_identical(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    trained.save(tmp_path / "first")
    opened = DiffusionPipeline.from_pretrained(tmp_path / "first", trust_remote_code=True)
    opened.save_pretrained(tmp_path / "second")
    code = [
        {path.relative_to(tmp_path / name): path.read_text() for path in (tmp_path / name).rglob("*.py")}
        for name in ("first", "second")
    ]
    assert code[0] == code[1]
    again = DiffusionPipeline.from_pretrained(tmp_path / "second", trust_remote_code=True)
    for each in (opened, again):
        each.set_progress_bar_config(disable=True)
    assert type(again).__module__.startswith("diffusers_modules.") and torch.equal(draw(opened), draw(again))


def test_code_changes_get_another_name(monkeypatch):
    name, source = portable_code("ldm.sampling.diffusers_pipeline")
    read_text = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **options: read_text(path, **options) + "# edited\n")
    other, edited = portable_code("ldm.sampling.diffusers_pipeline")
    assert name != other and source != edited


def test_arguments_have_their_documented_effect(pipeline):
    images = draw(pipeline)
    assert images.shape == (1, 3, 16, 16) and torch.equal(draw(pipeline), images)
    assert not torch.equal(draw(pipeline, seed=1), images)
    pil, array = draw(pipeline, output_type="pil")[0], draw(pipeline, output_type="np")
    assert np.abs(np.array(pil) / 255 - array[0]).max() < 0.51 / 255
    assert np.array_equal(array, images.permute(0, 2, 3, 1).numpy())
    z = draw(pipeline, output_type="latent")
    assert z.shape == (1, 3, 8, 8) and torch.equal(pipeline._decode(z, "pt"), images)
    noise = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(pipeline, seed=5, latents=noise), images)
    assert torch.equal(draw(pipeline, negative_prompt=""), images)
    assert not torch.equal(draw(pipeline, negative_prompt="green"), images)
    assert not torch.equal(draw(pipeline, guidance_scale=1.0), images)
    assert draw(pipeline, num_images_per_prompt=3).shape[0] == 3
    assert draw(pipeline, prompt=["red", "green"], num_images_per_prompt=2).shape[0] == 4
    with pytest.warns(UserWarning, match="trained on images of 16 x 16 pixels; 24 x 16 may look worse"):
        assert draw(pipeline, height=24).shape == (1, 3, 24, 16)


def test_callback_sees_and_replaces_latents(pipeline):
    calls = []

    def callback(pipe, i, t, tensors):
        calls.append((i, t, tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 3 else None

    z = draw(pipeline, callback_on_step_end=callback, output_type="latent")
    assert [call[:2] for call in calls] == [(0, 59), (1, 44), (2, 29), (3, 14)] and not z.any()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_can_be_exchanged(pipeline, name):
    """With many steps, all deterministic schedulers solve the same ODE. Euler's method is DDIM in other variables."""
    config = pipeline.scheduler.config
    solutions = {}
    for kind in ("DDIMScheduler", "DPMSolverMultistepScheduler", name):
        pipeline.scheduler = getattr(diffusers, kind).from_config(config)
        solutions[kind] = draw(pipeline, num_inference_steps=60)
    assert solutions[name].isfinite().all()
    if name == "EulerDiscreteScheduler":
        torch.testing.assert_close(solutions[name], solutions["DDIMScheduler"], rtol=0, atol=1e-4)
    elif name != "DDPMScheduler":
        assert (solutions[name] - solutions["DPMSolverMultistepScheduler"]).abs().mean() < 0.02


def test_half_precision_draws_similar_images(pipeline):
    images = draw(pipeline)
    pipeline.to(torch.bfloat16)
    assert (draw(pipeline).float() - images).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": 1}, "takes no class_labels. Use prompt"),
        ({"num_inference_steps": 61}, "num_inference_steps must be between 1 and 60; got 61"),
        ({"height": 15}, "height must be a positive multiple of 2, such as 16; got 15"),
        ({"output_type": "jpg"}, "output_type must be pil, np, pt or latent; got 'jpg'"),
        ({"negative_prompt": ["red", "green"]}, "negative_prompt has 2 texts for 1 prompts"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents must have the shape \[1, 3, 8, 8\]; got \[1, 4, 8, 8\]"),
    ],
)
def test_bad_arguments_are_explained(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(pipeline, **arguments)


def test_unsuitable_schedulers_are_refused(pipeline, encoder):
    config = pipeline.scheduler.config
    pipeline.scheduler = diffusers.PNDMScheduler.from_config(config)
    with pytest.raises(ValueError, match="PNDMScheduler accepts no predictions of z_0. Use one of: DDIMScheduler"):
        draw(pipeline)
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
    with pytest.raises(ValueError, match="use_karras_sigmas chooses steps that the chain does not have"):
        draw(pipeline)
    flow = build("dit", "class", "identity", CHAINS[2], encoder).to_diffusers()
    flow.scheduler = diffusers.EulerDiscreteScheduler.from_config(flow.scheduler.config)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler cannot start from pure noise"):
        flow(class_labels="cat")
    with pytest.raises(ValueError, match="class_labels: dog is not a class of this model. It has 2: cat, 1"):
        flow(class_labels="dog")
    with pytest.raises(ValueError, match="takes no prompt. Use class_labels"):
        flow(prompt="red")


def test_pushing_without_the_code_is_refused(pipeline, tmp_path):
    with pytest.raises(ValueError, match="without its code"):
        pipeline.save_pretrained(tmp_path, push_to_hub=True)


def test_opening_without_trust_remote_code_names_the_option(trained, tmp_path):
    trained.save(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_saved_pipeline_keeps_both_decoders(trained, tmp_path):
    trained.save(tmp_path / "a")
    z = torch.randn(2, 3, 8, 8)
    loaded = LatentDiffusion.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    for each in (loaded, LatentDiffusion.load(tmp_path / "b")):
        assert torch.equal(each.autoencoder.decode(z), trained.autoencoder.decode(z))
        torch.testing.assert_close(each.decode(z), trained.decode(z), rtol=0, atol=1e-6)
        assert each.autoencoder.weights_sha256() == trained.autoencoder.weights_sha256()
        assert each.autoencoder.sampling_decoder_sha256() == trained.autoencoder.sampling_decoder_sha256()
    assert (trained.decode(z) - trained.autoencoder.decode(z)).abs().max() > 0.01
