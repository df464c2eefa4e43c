"""Pipelines with untrained networks: requests, sampling, guidance, saving and loading."""

import dataclasses
import json
import re

import pytest
import torch
from diffusers import AutoencoderKL

from ldm.autoencoder.autoencoder import Autoencoder, LatentStatistics, weights_sha256
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.ddpm import DDPM
from ldm.diffusion.schedule import linear
from ldm.errors import UserError
from ldm.image_grid import to_pil
from ldm.latents.contract import LatentContract
from ldm.networks.conditioning import ClassCondition, NoCondition
from ldm.networks.dit import DiT
from ldm.networks.unet import unet
from ldm.runtime.random import sample_generators
from ldm.sampling.draw import draw_batches, film_strip, write_samples
from ldm.sampling.pipeline import VARIANCE_FILE, LatentDiffusion
from ldm.sampling.request import Request, read_prompts

SAMPLER = DDIM(3)


def build_autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    model = AutoencoderKL(block_out_channels=(8,), latent_channels=3, norm_num_groups=4).eval()
    return Autoencoder(model, LatentStatistics([0.1, 0, 0], [1, 2, 1], [0.1] * 3, "images", weights_sha256(model)))


def randomise(network: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def build_pipeline(conditioning=None, network=None, **options) -> LatentDiffusion:
    conditioning, autoencoder = conditioning or NoCondition(), build_autoencoder()
    sizes = {"sample_size": 8, "in_channels": 3, "out_channels": 3, **conditioning.network_options()}
    contract = LatentContract(autoencoder.weights_sha256(), "images", 8, 1, 3, 0.05, False)
    return LatentDiffusion(
        network=randomise(network or DiT(patch_size=2, hidden_dim=16, depth=1, head_dim=8, **sizes)),
        autoencoder=autoencoder,
        schedule=linear(50),
        prediction="v",
        conditioning=conditioning,
        contract=contract,
        latent_shape=(3, 8, 8),
        **options,
    )


@pytest.fixture
def class_pipeline() -> LatentDiffusion:
    return build_pipeline(ClassCondition(["cat", "dog"]))


def generate(pipeline, request, **options) -> torch.Tensor:
    return torch.cat(list(draw_batches(pipeline, request, SAMPLER, **{"guidance": 2.0, "seed": 0, **options})))


@pytest.mark.parametrize("kind", ["none", "class", "unet", "learned variance"])
def test_loaded_pipeline_generates_the_same_images(tmp_path, kind):
    sizes, options = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "head_dim": 4}, {}
    if kind == "class":
        options = {"conditioning": ClassCondition(["cat", "dog"])}
    elif kind == "unet":
        options = {"network": unet(**sizes, block_out_channels=(8,), norm_num_groups=4)}
    elif kind == "learned variance":
        network = DiT(**{**sizes, "out_channels": 6}, hidden_dim=16, depth=1)
        options = {"network": network, "variance": "learned_range"}
    pipeline = build_pipeline(**options)
    pipeline.save(tmp_path)
    loaded = LatentDiffusion.load(tmp_path)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    names = ("config.json", "diffusion_pytorch_model.safetensors")
    model_files = {f"{folder}/{name}" for folder in ("network", "vae") for name in names}
    others = {"model_index.json", "contract.json", "vae/latents.json", "scheduler/scheduler_config.json"}
    assert {file for file in files if not file.endswith(".py")} == model_files | others
    assert loaded.contract == pipeline.contract and loaded.latent_shape == (3, 8, 8)
    assert torch.equal(loaded.schedule.alpha_bar, pipeline.schedule.alpha_bar), "float64 must be restored exactly"
    request = Request.from_options(pipeline, num_samples=2)
    torch.testing.assert_close(generate(loaded, request), generate(pipeline, request), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"settings": {"format": 0}}, "has format 0; this version of ldm reads formats 1 to 3"),
        ("model_index.json", {"settings": None}, "has format None.*no pipelines of other programs"),
        ("model_index.json", {"network": ["x", "Mystery"]}, "network Mystery.*DiT"),
        ("contract.json", {"autoencoder_sha256": "f" * 64}, "trained on latents of the autoencoder ffffffffffff"),
    ],
)
def test_load_rejects_mismatched_files(tmp_path, file, changes, message):
    build_pipeline().save(tmp_path)
    (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | changes))
    with pytest.raises(UserError, match=message):
        LatentDiffusion.load(tmp_path)


def test_guidance_of_one_equals_the_conditional_model(class_pipeline):
    request = Request.from_options(class_pipeline, label=1, num_samples=3)
    unguided = generate(class_pipeline, request, guidance=1.0)
    torch.testing.assert_close(generate(class_pipeline, request, guidance=1.0 + 1e-6), unguided, rtol=0, atol=1e-3)
    assert (generate(class_pipeline, request, guidance=4.0) - unguided).abs().max() > 0.01


def test_guidance_applies_only_within_its_interval(class_pipeline):
    request = Request.from_options(class_pipeline, label=1, num_samples=2)
    unguided, guided = (generate(class_pipeline, request, guidance=scale) for scale in (1.0, 4.0))
    assert torch.equal(generate(class_pipeline, request, guidance=4.0, guidance_interval=[0.0, 1.0]), guided)
    assert torch.equal(generate(class_pipeline, request, guidance=4.0, guidance_interval=[0.0, 0.0]), unguided)
    partially_guided = generate(class_pipeline, request, guidance=4.0, guidance_interval=[0.3, 0.7])
    assert not torch.equal(partially_guided, unguided) and not torch.equal(partially_guided, guided)
    for invalid in ([0.8, 0.2], 0.5, ["a", "b"]):
        with pytest.raises(UserError, match=f"guidance_interval={re.escape(str(invalid))} must be the lowest and"):
            generate(class_pipeline, request, guidance_interval=invalid)


def test_draw_batches_rejects_samplers_incompatible_with_the_model(class_pipeline, tmp_path):
    request = Request.from_options(class_pipeline, num_samples=1)
    for sampler, message in (
        (DDIM(51), "sampler=ddim with 51 steps.*1 to 50"),
        (DDPM(5, variance="learned_range"), "variance=learned_range.*learned Sigma.*fixed_small"),
        (DDPM(5, variance="optimal"), "optimal variance has not been fitted"),
    ):
        with pytest.raises(UserError, match=message):
            next(draw_batches(class_pipeline, request, sampler, guidance=1.0, seed=0))
    class_pipeline.save(tmp_path)
    (tmp_path / VARIANCE_FILE).write_text('{"z_0_mse": [0.0, 0.')
    with pytest.raises(UserError, match=VARIANCE_FILE):
        LatentDiffusion.load(tmp_path)
    class_pipeline.save(tmp_path)
    assert LatentDiffusion.load(tmp_path).z_0_mse is None, "saving new weights removes the fitted table"


def test_images_depend_on_seed_and_label(class_pipeline):
    cat, dog = (Request.from_options(class_pipeline, label=label, num_samples=2) for label in (0, 1))
    assert torch.equal(generate(class_pipeline, cat), generate(class_pipeline, cat))
    assert not torch.equal(generate(class_pipeline, cat), generate(class_pipeline, dog))
    assert not torch.equal(generate(class_pipeline, cat), generate(class_pipeline, cat, seed=1))


def test_neighbouring_seeds_share_no_sample_generator():
    seeds = {g.initial_seed() for g in sample_generators(0, range(10_000))}
    assert seeds.isdisjoint(g.initial_seed() for g in sample_generators(1, range(10_000)))


def test_decode_unstandardises_latents():
    pipeline = build_pipeline()
    expected = pipeline.autoencoder.decode(torch.tensor([0.1, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 8, 8))
    torch.testing.assert_close(pipeline.decode(torch.zeros(1, 3, 8, 8)), expected)


def test_forward_chain_visits_evenly_spaced_times():
    pipeline = build_pipeline()
    times, frames = pipeline.forward_chain(torch.zeros(1, 3, 8, 8), steps=5, seed=0)
    assert times == [0, 10, 20, 30, 40, 50] and frames.shape == (6, 3, 8, 8)
    seed_0, seed_1 = (pipeline.forward_chain(torch.zeros(1, 3, 8, 8), steps=5, seed=seed)[1] for seed in (0, 1))
    assert torch.equal(frames, seed_0) and not torch.equal(frames, seed_1)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("none", {"prompt": "cat"}, "unconditional.*prompt or label"),
        ("class", {"prompt": "cat"}, "conditioned on classes.*a label instead"),
        ("none", {"label": 1}, "unconditional.*prompt or label"),
        ("class", {"label": 2}, "label=2.*0=cat, 1=dog"),
        ("none", {"num_samples": 0}, "num_samples=0 must be 1 or more"),
    ],
)
def test_request_rejects_conditions_that_the_model_does_not_support(kind, options, message):
    pipeline = build_pipeline(ClassCondition(["cat", "dog"]) if kind == "class" else None)
    with pytest.raises(UserError, match=message):
        Request.from_options(pipeline, **options)


def test_request_cycles_through_classes_without_a_label(class_pipeline):
    request = Request.from_options(class_pipeline, num_samples=5)
    assert request.captions == ["cat", "dog", "cat", "dog", "cat"]
    assert request.condition["label"].tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("options", "captions"),
    [
        ({"label": "dog"}, ["dog"] * 16),
        ({"label": 1, "num_samples": 2}, ["dog"] * 2),
        ({"label": ["dog", "cat"]}, ["dog", "cat"]),
        ({"label": ["dog", "cat"], "num_samples": 2}, ["dog", "dog", "cat", "cat"]),
    ],
)
def test_num_samples_is_the_number_per_class(class_pipeline, options, captions):
    assert Request.from_options(class_pipeline, **options).captions == captions


def test_num_samples_is_the_number_per_prompt(class_pipeline, tmp_path, monkeypatch):
    requests = []
    monkeypatch.setattr(ClassCondition, "for_request", lambda _, *request: requests.append(request) or ({}, []))
    (tmp_path / "prompts.txt").write_text("sun\nmoon\n")
    for num_samples in (None, 2):
        Request.from_options(class_pipeline, prompts=str(tmp_path / "prompts.txt"), num_samples=num_samples)
    Request.from_options(class_pipeline, prompt="sun", num_samples=3)
    assert [prompts for prompts, *_ in requests] == [["sun", "moon"], ["sun", "sun", "moon", "moon"], ["sun"] * 3]
    with pytest.raises(UserError, match="prompt= and prompts="):
        Request.from_options(class_pipeline, prompts=str(tmp_path / "prompts.txt"), prompt="sun")


def test_read_prompts_skips_blank_lines(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("  red heart \n\n“8”\n", encoding="utf-8")
    assert read_prompts(str(file)) == ["red heart", "“8”"]
    file.write_bytes("a red\u2028ball\r\na blue\x0cbox\na green\u0085cup".encode())
    assert read_prompts(str(file)) == ["a red\u2028ball", "a blue\x0cbox", "a green\u0085cup"], (
        "only line feeds end a prompt"
    )
    file.write_text("\n \n")
    with pytest.raises(UserError, match=r"prompts=.*no captions"):
        read_prompts(str(file))
    with pytest.raises(UserError, match=r"prompts=.*missing\.txt is not a file"):
        read_prompts(str(tmp_path / "missing.txt"))


def test_film_strip_shows_the_first_samples(class_pipeline):
    request = Request.from_options(class_pipeline, num_samples=6)
    strip = film_strip(class_pipeline, request, SAMPLER, guidance=2.0, seed=0)
    single = film_strip(class_pipeline, dataclasses.replace(request, captions=["cat"]), SAMPLER, guidance=2.0, seed=0)
    assert strip.height > 3 * single.height and strip.width == single.width


def test_write_samples_saves_grid_captions_and_settings(class_pipeline, tmp_path):
    request = Request.from_options(class_pipeline, num_samples=3)
    path = write_samples(tmp_path / "a b", to_pil(generate(class_pipeline, request)), request.captions, {"seed": 0})
    assert path.name == "grid.png" and path.is_file()
    content = json.loads((tmp_path / "a b/samples.json").read_text())
    assert content["seed"] == 0 and content["samples"][2] == {"file": "00002.png", "caption": "cat"}
