"""Perceptual distances for the autoencoder loss: distances between features of a frozen network."""

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
"""Number of resolutions at which features are compared: H / 2, H / 4 and H / 8."""


class EfficientNetLiteDistance(nn.Module):
    """EfficientNet-lite0 perceptual distance without resizing the images: x, y [b, 3, H, W] in [-1, 1] -> [b].

    Features are taken after the last block at each of the resolutions H / 2, H / 4 and H / 8, and normalised to unit
    length across channels. Squared differences are summed over channels and averaged over locations and levels. The
    distance is differentiable with respect to both images.
    Source: Zhang et al. 2018, arXiv:1801.03924, eq. 1, without the learned channel weights.

    Raises:
        UserError: The required packages are not installed.
    """

    name = "efficientnet_lite"

    def __init__(self) -> None:
        super().__init__()
        network = _efficientnet_lite("The EfficientNet-lite0 perceptual distance")
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        halvings = [i for i, block in enumerate(network._blocks) if block._block_args.stride in (2, [2])]
        # deeper levels would double the cost, and have at most 2 x 2 locations for images of 32 x 32 pixels
        ends = halvings[:NUM_LEVELS]
        starts = [0, *ends[:-1]]
        self.levels = nn.ModuleList(nn.Sequential(*network._blocks[a:b]) for a, b in zip(starts, ends, strict=True))

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the features at each level, normalised to unit length across channels."""
        x = self.stem(_normalise(images).to(memory_format=torch.channels_last))
        features = []
        for level in self.levels:
            x = level(x)
            features.append(F.normalize(x.float(), dim=1, eps=1e-6))
        return features

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        # on a CPU, depthwise convolutions are 1.4x faster in float32 than in bfloat16
        use_autocast = torch.is_autocast_enabled(x.device.type) and x.device.type != "cpu"
        with torch.autocast(x.device.type, enabled=use_autocast):
            features = zip(self.features(x), self.features(y), strict=True)
            return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in features]).mean(0)


class LPIPS(nn.Module):
    """LPIPS with VGG-16, from the `lpips` package: x, y [b, 3, H, W] in [-1, 1] -> [b].

    torchvision downloads the weights of VGG-16 on first use.
    Source: Zhang et al. 2018, arXiv:1801.03924.

    Raises:
        InputError: The package is not installed, or the weights cannot be downloaded.
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
                f"needs the weights of VGG-16, which could not be downloaded ({error.reason}). Download them on "
                "another machine and copy ~/.cache/torch/hub/checkpoints from there to this machine"
            )
            raise InputError("perceptual", self.name, rule) from error

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.network(x, y).flatten()


def has_lpips() -> bool:
    """Return True if the `lpips` package is installed."""
    return find_spec("lpips") is not None


class Perceptual:
    """A perceptual distance and its weight in the loss.

    Args:
        network: Maps images x and y, both [b, 3, H, W] in [-1, 1], to distances [b]. The network's `name` attribute is
            the name that selects it on the command line.
        weight: Weight of the distance in the loss.
    """

    @checked
    def __init__(self, network: nn.Module, weight: NonNegative = 1.0) -> None:
        self.network, self.weight = network.eval().requires_grad_(False), weight
        self.name: str = network.name  # type: ignore[assignment]

    def __call__(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        self.network.to(images.device)
        return self.network(images, reconstruction).float().mean()
