"""ldm.features: what LPIPS needs and gives, with a stand-in for its package."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from urllib.error import URLError

import pytest
import torch

from ldm import features
from ldm.errors import UserError


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
    network = features.LPIPS()
    assert features.has_lpips() and network.name == "lpips"
    x, y = torch.zeros(3, 3, 8, 8), torch.full((3, 3, 8, 8), 0.5, requires_grad=True)
    found = network(x, y)
    torch.testing.assert_close(found, torch.full((3,), 0.25))
    found.sum().backward()
    assert y.grad.all() and not any(p.requires_grad for p in network.parameters())


def test_without_the_package():
    assert not features.has_lpips()
    with pytest.raises(UserError, match=r'pip install "ldm\[lpips\]".*perceptual=efficientnet_lite'):
        features.LPIPS()


def test_without_a_network_to_fetch_the_weights(stand_in, monkeypatch):
    def refuse(**options):
        raise URLError("no route")

    monkeypatch.setattr(stand_in, "LPIPS", refuse)
    with pytest.raises(UserError, match="VGG-16 for LPIPS could not be fetched.*no route"):
        features.LPIPS()
