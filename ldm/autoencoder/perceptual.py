"""Distances in the features of a frozen network, for the loss of an autoencoder."""

from importlib.util import find_spec
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.metrics.features import _efficientnet_lite, _normalise
from ldm.rules import NonNegative, checked
from ldm.runtime import shell

NUM_LEVELS = 3
"""Resolutions at which features are compared: H / 2, H / 4, H / 8."""


class EfficientNetLiteDistance(nn.Module):
    """A perceptual distance of images at their native size: [b, 3, H, W] twice, in [-1, 1] -> [b].

    At the last layer of each resolution, H / 2 to H / 8, both features of EfficientNet-lite0 are scaled to unit length
    over the channels; the distance is their squared difference, summed over the channels, averaged over the locations
    and the levels. It has a gradient in both. Source: Zhang et al. 2018, arXiv:1801.03924, eq. 1, without learned
    weights of the channels.

    Raises:
        UserError: the packages are not installed.
    """

    name = "efficientnet_lite"

    def __init__(self) -> None:
        super().__init__()
        network = _efficientnet_lite("The perceptual distance of EfficientNet-lite0")
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        halvings = [i for i, block in enumerate(network._blocks) if block._block_args.stride in (2, [2])]
        # deeper ones would double the cost, for features of which an image of 32 px has four
        ends = halvings[:NUM_LEVELS]
        starts = [0, *ends[:-1]]
        self.levels = nn.ModuleList(nn.Sequential(*network._blocks[a:b]) for a, b in zip(starts, ends, strict=True))

    def features(self, images: Tensor) -> list[Tensor]:
        """One feature per level, each of unit length over its channels."""
        x = self.stem(_normalise(images).to(memory_format=torch.channels_last))
        found = []
        for level in self.levels:
            x = level(x)
            found.append(F.normalize(x.float(), dim=1, eps=1e-6))
        return found

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        # a CPU's depthwise convolutions are 1.4 times as fast in float32 as in bfloat16
        lower = torch.is_autocast_enabled(x.device.type) and x.device.type != "cpu"
        with torch.autocast(x.device.type, enabled=lower):
            features = zip(self.features(x), self.features(y), strict=True)
            return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in features]).mean(0)


class LPIPS(nn.Module):
    """LPIPS with VGG-16, the published perceptual distance: [b, 3, H, W] twice, in [-1, 1] -> [b].

    Through the `lpips` package; torchvision fetches VGG's weights on first use.
    Source: Zhang et al. 2018, arXiv:1801.03924.

    Raises:
        InputError: the package is not installed, or the weights cannot be fetched.
    """

    name = "lpips"

    def __init__(self) -> None:
        super().__init__()
        if not has_lpips():
            raise InputError("perceptual", self.name, f"needs torchvision and lpips: {shell.install_command('lpips')}")
        import lpips

        try:
            self.network = lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
        except URLError as error:
            rule = (
                f"needs the weights of VGG-16, which could not be downloaded ({error.reason}): download them "
                "elsewhere and copy that machine's ~/.cache/torch/hub/checkpoints here"
            )
            raise InputError("perceptual", self.name, rule) from error

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.network(x, y).flatten()


def has_lpips() -> bool:
    """Whether the `lpips` package is installed."""
    return find_spec("lpips") is not None


class Perceptual:
    """A distance of images in features of a frozen network, with its weight.

    Args:
        network: (x, y), both [b, 3, H, W] in [-1, 1] -> [b]; `name` is what the command line calls it.
    """

    @checked
    def __init__(self, network: nn.Module, weight: NonNegative = 1.0) -> None:
        self.network, self.weight = network.eval().requires_grad_(False), weight
        self.name: str = network.name  # type: ignore[assignment]

    def __call__(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        self.network.to(images.device)
        return self.network(images, reconstruction).float().mean()
