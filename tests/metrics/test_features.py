"""ldm.metrics.features: LPIPS and Inception with stand-ins for their packages, vision transformers from folders."""

import json
import shutil
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

from ldm.autoencoder import perceptual
from ldm.errors import UserError
from ldm.evaluation.features import load_features


@pytest.fixture
def stand_in(monkeypatch):
    """A package `lpips` whose network answers as the real one does: [b, 1, 1, 1]."""

    class Network(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert net == "vgg" and not verbose
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, y):
            return self.weight * (x - y).square().mean((1, 2, 3), keepdim=True)

    module = ModuleType("lpips")
    module.__spec__ = ModuleSpec("lpips", None)
    module.LPIPS = Network
    monkeypatch.setitem(sys.modules, "lpips", module)
    return module


def test_a_value_per_image_with_a_gradient_and_frozen_weights(stand_in):
    network = perceptual.LPIPS()
    assert perceptual.has_lpips() and network.name == "lpips"
    x, y = torch.zeros(3, 3, 8, 8), torch.full((3, 3, 8, 8), 0.5, requires_grad=True)
    found = network(x, y)
    torch.testing.assert_close(found, torch.full((3,), 0.25))
    found.sum().backward()
    assert y.grad.all() and not any(p.requires_grad for p in network.parameters())


def test_without_a_network_to_fetch_the_weights_or_without_the_package(stand_in, monkeypatch):
    def refuse(**options):
        raise URLError("no route")

    monkeypatch.setattr(stand_in, "LPIPS", refuse)
    with pytest.raises(UserError, match="needs the weights of VGG-16.*no route"):
        perceptual.LPIPS()
    monkeypatch.delitem(sys.modules, "lpips")
    assert not perceptual.has_lpips()
    with pytest.raises(UserError, match=r"perceptual=lpips needs .*pip install 'ldm-trainer\[lpips\]'"):
        perceptual.LPIPS()


PIXELS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A folder of a tiny one."""
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SIZES)).save_pretrained(folder)
    processor = {**PIXELS, "size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = CLIPVisionConfig(intermediate_size=32, projection_dim=8, **SIZES)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**PIXELS, "size": 28, "crop_size": 28}))
    return folder


@pytest.mark.parametrize(("name", "dim"), [("dinov2", 16), ("clip", 8)])
def test_a_vision_transformer_of_a_folder(request, name, dim):
    """Its own answer to images that were resized and normalised by Pillow and numpy."""
    folder = request.getfixturevalue(name)
    network = load_features(name, path=str(folder))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 14, 14, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    found = network(images)
    assert found.shape == (2, dim) and not found.requires_grad and not network.training
    resized = np.stack([Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC) for image in pixels]) / 255
    inputs = torch.tensor((resized - PIXELS["image_mean"]) / PIXELS["image_std"]).permute(0, 3, 1, 2).float()
    model = {"dinov2": Dinov2Model, "clip": CLIPVisionModelWithProjection}[name].from_pretrained(folder)
    with torch.no_grad():
        answer = model(pixel_values=inputs)
    expected = answer.last_hidden_state[:, 0] if name == "dinov2" else answer.image_embeds
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    assert (found - expected).abs().mean() < 0.1 * (found[0] - found[1]).abs().mean()


def test_its_key_tells_weights_and_size_apart(dinov2, tmp_path):
    network = load_features("dinov2", path=str(dinov2))
    other = shutil.copytree(dinov2, tmp_path / "other")
    assert load_features("dinov2", path=str(other)).key == network.key
    assert network.key.startswith("dinov2-") and network.key.endswith("-28px")
    processor = other / "preprocessor_config.json"
    processor.write_text(json.dumps({**PIXELS, "size": {"height": 42, "width": 42}}))
    assert load_features("dinov2", path=str(other)).key == network.key.replace("28px", "42px")
    network.network.layernorm.weight.data[0] += 1
    network.network.save_pretrained(other)
    assert load_features("dinov2", path=str(other)).key.split("-")[1] != network.key.split("-")[1]


def test_a_folder_that_is_none(tmp_path, dinov2, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="features_path=.*nothing is no folder with .* of dinov2"):
        load_features("dinov2", path=str(tmp_path / "nothing"))
    bare = shutil.copytree(dinov2, tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="preprocessor_config.json"):
        load_features("dinov2", path=str(bare))
    with pytest.raises(UserError, match="features_path=/x is for features=dinov2 or clip; features=inception takes"):
        load_features("inception", path="/x")


def test_inception_with_a_stand_in(monkeypatch):
    """Pixels from 0 to 1 go in, [b, 2048, 1, 1] in a list comes out; nothing is known of a package that is missing."""
    monkeypatch.setitem(sys.modules, "pytorch_fid", None)
    with pytest.raises(UserError, match=r"features=inception needs .*pip install 'ldm-trainer\[inception\]'"):
        load_features("inception")

    class InceptionV3(torch.nn.Module):
        trained = 1.0

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((2048,), self.trained))

        def forward(self, pixels):
            assert pixels.min() >= 0 and pixels.max() <= 1
            return [pixels.mean((1, 2, 3))[:, None, None, None] * self.weight[:, None, None]]

    package, module = ModuleType("pytorch_fid"), ModuleType("pytorch_fid.inception")
    package.__spec__ = ModuleSpec("pytorch_fid", None)
    module.InceptionV3 = InceptionV3
    monkeypatch.setitem(sys.modules, "pytorch_fid", package)
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", module)
    network = load_features("inception")
    assert network.key.startswith("inception-") and network.key.endswith("-299px")
    monkeypatch.setattr(InceptionV3, "trained", 2.0)
    assert load_features("inception").key != network.key, "other weights are other features"
    assert network.is_fid and network(torch.full((2, 3, 8, 8), 1.01)).equal(torch.ones(2, 2048))

    def refuse(self) -> None:
        raise URLError("no route")

    monkeypatch.setattr(InceptionV3, "__init__", refuse)
    with pytest.raises(UserError, match="Inception-v3, which could not be downloaded .no route"):
        load_features("inception")
