"""Tests of feature networks: LPIPS and Inception from fake packages, and vision transformers loaded from folders."""

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
def fake_lpips(monkeypatch):
    """A fake `lpips` package, whose network returns [b, 1, 1, 1] like the real network."""

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


def test_lpips_returns_differentiable_values_with_frozen_weights(fake_lpips):
    network = perceptual.LPIPS()
    assert perceptual.has_lpips() and network.name == "lpips"
    x, y = torch.zeros(3, 3, 8, 8), torch.full((3, 3, 8, 8), 0.5, requires_grad=True)
    distances = network(x, y)
    torch.testing.assert_close(distances, torch.full((3,), 0.25))
    distances.sum().backward()
    assert y.grad.all() and not any(p.requires_grad for p in network.parameters())


def test_lpips_reports_missing_weights_and_missing_package(fake_lpips, monkeypatch):
    def fail(**options):
        raise URLError("no route")

    monkeypatch.setattr(fake_lpips, "LPIPS", fail)
    with pytest.raises(UserError, match="needs the weights of VGG-16.*no route"):
        perceptual.LPIPS()
    monkeypatch.delitem(sys.modules, "lpips")
    assert not perceptual.has_lpips()
    with pytest.raises(UserError, match=r"perceptual=lpips needs .*pip install 'ldm-trainer\[lpips\]'"):
        perceptual.LPIPS()


SCALING = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """The folder of a tiny DINOv2 model."""
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SIZES)).save_pretrained(folder)
    processor = {**SCALING, "size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a tiny CLIP model."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = CLIPVisionConfig(intermediate_size=32, projection_dim=8, **SIZES)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**SCALING, "size": 28, "crop_size": 28}))
    return folder


@pytest.mark.parametrize(("name", "dim"), [("dinov2", 16), ("clip", 8)])
def test_vision_transformer_from_folder_equals_transformers(request, name, dim):
    """The reference is the model's output for images resized by Pillow and normalised by numpy."""
    folder = request.getfixturevalue(name)
    network = load_features(name, path=str(folder))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 14, 14, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    features = network(images)
    assert features.shape == (2, dim) and not features.requires_grad and not network.training
    resized = np.stack([Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC) for image in pixels]) / 255
    inputs = torch.tensor((resized - SCALING["image_mean"]) / SCALING["image_std"]).permute(0, 3, 1, 2).float()
    model = {"dinov2": Dinov2Model, "clip": CLIPVisionModelWithProjection}[name].from_pretrained(folder)
    with torch.no_grad():
        output = model(pixel_values=inputs)
    expected = output.last_hidden_state[:, 0] if name == "dinov2" else output.image_embeds
    torch.testing.assert_close(features, expected, rtol=0, atol=0.02)
    assert (features - expected).abs().mean() < 0.1 * (features[0] - features[1]).abs().mean()


def test_key_depends_on_weights_and_size(dinov2, tmp_path):
    network = load_features("dinov2", path=str(dinov2))
    copy = shutil.copytree(dinov2, tmp_path / "copy")
    assert load_features("dinov2", path=str(copy)).key == network.key
    assert network.key.startswith("dinov2-") and network.key.endswith("-28px")
    processor = copy / "preprocessor_config.json"
    processor.write_text(json.dumps({**SCALING, "size": {"height": 42, "width": 42}}))
    assert load_features("dinov2", path=str(copy)).key == network.key.replace("28px", "42px")
    network.network.layernorm.weight.data[0] += 1
    network.network.save_pretrained(copy)
    assert load_features("dinov2", path=str(copy)).key.split("-")[1] != network.key.split("-")[1]


def test_unusable_features_path_is_rejected(tmp_path, dinov2, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="features_path=.*missing .*folder .* of dinov2 .*hub id"):
        load_features("dinov2", path=str(tmp_path / "missing"))
    incomplete = shutil.copytree(dinov2, tmp_path / "incomplete")
    (incomplete / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="preprocessor_config.json"):
        load_features("dinov2", path=str(incomplete))
    with pytest.raises(UserError, match="features_path=/x .*dinov2 or clip.*features=inception"):
        load_features("inception", path="/x")


def test_inception_is_loaded_from_a_fake_package(monkeypatch):
    """The fake network expects pixels in [0, 1] and returns [b, 2048, 1, 1] in a list, like pytorch-fid's network."""
    monkeypatch.setitem(sys.modules, "pytorch_fid", None)
    with pytest.raises(UserError, match=r"features=inception needs .*pip install 'ldm-trainer\[inception\]'"):
        load_features("inception")

    class InceptionV3(torch.nn.Module):
        weight_value = 1.0

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((2048,), self.weight_value))

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
    monkeypatch.setattr(InceptionV3, "weight_value", 2.0)
    assert load_features("inception").key != network.key, "the key depends on the weights"
    assert network.is_fid and network(torch.full((2, 3, 8, 8), 1.01)).equal(torch.ones(2, 2048))

    def fail(self) -> None:
        raise URLError("no route")

    monkeypatch.setattr(InceptionV3, "__init__", fail)
    with pytest.raises(UserError, match="Inception-v3 .*could not be downloaded .*no route"):
        load_features("inception")
