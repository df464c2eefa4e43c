"""pipeline and draw on untrained parts: what is asked for, what is drawn, what a folder keeps."""

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
from ldm.sampling.draw import draw, film_strip, write
from ldm.sampling.pipeline import VARIANCE_FILE, LatentDiffusionPipeline
from ldm.sampling.request import Request, read_prompts

SAMPLER = DDIM(3)


def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    model = AutoencoderKL(block_out_channels=(8,), latent_channels=3, norm_num_groups=4).eval()
    return Autoencoder(model, LatentStatistics([0.1, 0, 0], [1, 2, 1], [0.1] * 3, "images", weights_sha256(model)))


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def build(conditioning=None, network=None, **options) -> LatentDiffusionPipeline:
    conditioning, parts = conditioning or NoCondition(), autoencoder()
    sizes = {"sample_size": 8, "in_channels": 3, "out_channels": 3, **conditioning.network_options()}
    contract = LatentContract(parts.weights_sha256(), "images", 8, 1, 3, 0.05, False)
    return LatentDiffusionPipeline(
        network=randomised(network or DiT(patch_size=2, hidden_dim=16, depth=1, head_dim=8, **sizes)),
        autoencoder=parts,
        schedule=linear(50),
        prediction="v",
        conditioning=conditioning,
        contract=contract,
        latent_shape=(3, 8, 8),
        **options,
    )


@pytest.fixture
def classes() -> LatentDiffusionPipeline:
    return build(ClassCondition(["cat", "dog"]))


def images_of(pipeline, request, **options) -> torch.Tensor:
    return torch.cat(list(draw(pipeline, request, SAMPLER, **{"guidance": 2.0, "seed": 0, **options})))


@pytest.mark.parametrize("kind", ["none", "class", "unet", "learned variance"])
def test_it_survives_its_folder(tmp_path, kind):
    sizes, options = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "head_dim": 4}, {}
    if kind == "class":
        options = {"conditioning": ClassCondition(["cat", "dog"])}
    elif kind == "unet":
        options = {"network": unet(**sizes, block_out_channels=(8,), norm_num_groups=4)}
    elif kind == "learned variance":
        network = DiT(**{**sizes, "out_channels": 6}, hidden_dim=16, depth=1)
        options = {"network": network, "variance": "learned_range"}
    pipeline = build(**options)
    pipeline.save(tmp_path)
    loaded = LatentDiffusionPipeline.load(tmp_path)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    model = ("config.json", "diffusion_pytorch_model.safetensors")
    parts = {f"{part}/{file}" for part in ("network", "vae") for file in model}
    assert files == parts | {"model_index.json", "contract.json", "vae/latents.json"}
    assert loaded.contract == pipeline.contract and loaded.latent_shape == (3, 8, 8)
    assert torch.equal(loaded.schedule.alpha_bar, pipeline.schedule.alpha_bar), "to the last bit of float64"
    request = Request.make(pipeline, num_samples=2)
    torch.testing.assert_close(images_of(loaded, request), images_of(pipeline, request), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"format": 0}, "has format 0; this version reads 1"),
        ("model_index.json", {"network": "Mystery"}, "holds a network Mystery. Readable networks: DiT"),
        ("contract.json", {"autoencoder_sha256": "f" * 64}, "trained on latents of the autoencoder ffffffffffff"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(tmp_path, file, changes, message):
    build().save(tmp_path)
    (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | changes))
    with pytest.raises(UserError, match=message):
        LatentDiffusionPipeline.load(tmp_path)


def test_guidance_of_one_is_the_conditional_model(classes):
    request = Request.make(classes, label=1, num_samples=3)
    plain = images_of(classes, request, guidance=1.0)
    torch.testing.assert_close(images_of(classes, request, guidance=1.0 + 1e-6), plain, rtol=0, atol=1e-3)
    assert (images_of(classes, request, guidance=4.0) - plain).abs().max() > 0.01


def test_guidance_acts_on_its_interval(classes):
    request = Request.make(classes, label=1, num_samples=2)
    plain, guided = (images_of(classes, request, guidance=scale) for scale in (1.0, 4.0))
    assert torch.equal(images_of(classes, request, guidance=4.0, guidance_interval=[0.0, 1.0]), guided)
    assert torch.equal(images_of(classes, request, guidance=4.0, guidance_interval=[0.0, 0.0]), plain)
    partly = images_of(classes, request, guidance=4.0, guidance_interval=[0.3, 0.7])
    assert not torch.equal(partly, plain) and not torch.equal(partly, guided)
    for wrong in ([0.8, 0.2], 0.5, ["a", "b"]):
        with pytest.raises(UserError, match=f"guidance_interval={re.escape(str(wrong))} must be the lowest and the"):
            images_of(classes, request, guidance_interval=wrong)


def test_a_sampler_that_does_not_fit_the_model_is_refused(classes, tmp_path):
    request = Request.make(classes, num_samples=1)
    for sampler, message in (
        (DDIM(51), "sampler=ddim with 51 steps: .*1 to 50 steps"),
        (DDPM(5, variance="learned_range"), "needs a network that learned Sigma"),
        (DDPM(5, variance="optimal"), "not fitted for this model yet"),
    ):
        with pytest.raises(UserError, match=message):
            next(draw(classes, request, sampler, guidance=1.0, seed=0))
    classes.save(tmp_path)
    (tmp_path / VARIANCE_FILE).write_text('{"z_0_mse": [0.0, 0.')
    with pytest.raises(UserError, match=VARIANCE_FILE):
        LatentDiffusionPipeline.load(tmp_path)
    classes.save(tmp_path)
    assert LatentDiffusionPipeline.load(tmp_path).z_0_mse is None, "it was fitted to other weights"


def test_seeds_and_labels_make_the_difference(classes):
    cat, dog = (Request.make(classes, label=label, num_samples=2) for label in (0, 1))
    assert torch.equal(images_of(classes, cat), images_of(classes, cat))
    assert not torch.equal(images_of(classes, cat), images_of(classes, dog))
    assert not torch.equal(images_of(classes, cat), images_of(classes, cat, seed=1))


def test_generators_of_neighbouring_seeds_share_nothing():
    first = {g.initial_seed() for g in sample_generators(0, range(10_000))}
    assert first.isdisjoint(g.initial_seed() for g in sample_generators(1, range(10_000)))


def test_decoding_undoes_the_standardisation():
    pipeline = build()
    expected = pipeline.autoencoder.decode(torch.tensor([0.1, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 8, 8))
    torch.testing.assert_close(pipeline.decode(torch.zeros(1, 3, 8, 8)), expected)


def test_the_forward_chain_ends_in_noise():
    pipeline = build()
    visited, frames = pipeline.forward_chain(torch.zeros(1, 3, 8, 8), steps=5, seed=0)
    assert visited == [0, 10, 20, 30, 40, 50] and frames.shape == (6, 3, 8, 8)
    again, other = (pipeline.forward_chain(torch.zeros(1, 3, 8, 8), steps=5, seed=seed)[1] for seed in (0, 1))
    assert torch.equal(frames, again) and not torch.equal(frames, other)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("none", {"prompt": "cat"}, "unconditional: it takes neither a prompt nor a label"),
        ("class", {"prompt": "cat"}, "conditioned on class, not on text: it takes a label"),
        ("none", {"label": 1}, "unconditional: it takes neither a prompt nor a label"),
        ("class", {"label": 2}, "label=2 does not exist. Choose one of: 0=cat, 1=dog"),
        ("none", {"num_samples": 0}, "num_samples=0 must be 1 or more"),
    ],
)
def test_what_a_model_cannot_draw_is_explained(kind, options, message):
    pipeline = build(ClassCondition(["cat", "dog"]) if kind == "class" else None)
    with pytest.raises(UserError, match=message):
        Request.make(pipeline, **options)


def test_labels_take_turns_where_none_is_asked_for(classes):
    request = Request.make(classes, num_samples=5)
    assert request.captions == ["cat", "dog", "cat", "dog", "cat"]
    assert request.condition["label"].tolist() == [0, 1, 0, 1, 0]


def test_prompts_are_read_line_by_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("  red heart \n\n“8”\n", encoding="utf-8")
    assert read_prompts(str(file)) == ["red heart", "“8”"]
    file.write_text("\n \n")
    with pytest.raises(UserError, match="holds no caption"):
        read_prompts(str(file))
    with pytest.raises(UserError, match="is not a file"):
        read_prompts(str(tmp_path / "nothing.txt"))


def test_a_film_strip_shows_the_first_samples(classes):
    request = Request.make(classes, num_samples=6)
    strip = film_strip(classes, request, SAMPLER, guidance=2.0, seed=0)
    one = film_strip(classes, dataclasses.replace(request, captions=["cat"]), SAMPLER, guidance=2.0, seed=0)
    assert strip.height > 3 * one.height and strip.width == one.width


def test_samples_are_written_with_what_made_them(classes, tmp_path):
    request = Request.make(classes, num_samples=3)
    path = write(tmp_path / "a b", to_pil(images_of(classes, request)), request.captions, {"seed": 0})
    assert path.name == "grid.png" and path.is_file()
    content = json.loads((tmp_path / "a b/samples.json").read_text())
    assert content["seed"] == 0 and content["samples"][2] == {"file": "00002.png", "caption": "cat"}
