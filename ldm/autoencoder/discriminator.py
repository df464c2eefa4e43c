"""The adversarial game of stage 1: a discriminator of patches, the losses of both sides, and the weight between them.

The weight keeps the adversarial gradient as large as the distortion's at the decoder's last layer W:

    lambda = |dL_distortion / dW| / (|dL_adversarial / dW| + 1e-4),   at most `max_weight`

Source: Isola et al. 2017, arXiv:1611.07004 (patches); Esser et al. 2021, arXiv:2012.09841, eq. 7 (lambda).
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ldm.autoencoder.patch import PatchAutoencoder

GameType = Literal["hinge", "non_saturating"]


class PatchDiscriminator(nn.Module):
    """[b, 3, H, W] in [-1, 1] -> logits [b, 1, h, w], one per overlapping patch; above 0 means real.

    Args:
        channels: Width of the first level; it doubles with each.
        layers: Levels that halve the resolution; 3 see patches of 70 pixels.
    """

    def __init__(self, channels: int = 32, layers: int = 3) -> None:
        super().__init__()
        widths = [min(channels * 2**level, channels * 8) for level in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, layers + 1):
            # a group norm, not the published batch norm: logits that depend on the batch differ between ranks, and
            # between real and false batches
            parts += [
                nn.Conv2d(widths[level - 1], widths[level], 4, stride=2 if level < layers else 1, padding=1),
                nn.GroupNorm(math.gcd(32, widths[level]), widths[level]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def discriminator_loss(game: GameType, real: Tensor, false: Tensor) -> Tensor:
    """What the discriminator minimises over logits of images and of reconstructions.

    hinge: (E max(0, 1 - real) + E max(0, 1 + false)) / 2; non_saturating: E softplus(-real) + E softplus(false).
    Source: Lim & Ye 2017, arXiv:1705.02894; Goodfellow et al. 2014, arXiv:1406.2661.
    """
    real, false = real.float(), false.float()
    if game == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + false).mean()) / 2
    return F.softplus(-real).mean() + F.softplus(false).mean()


def generator_loss(game: GameType, false: Tensor) -> Tensor:
    """What the autoencoder minimises. hinge: -E false; non_saturating: E softplus(-false)."""
    false = false.float()
    return -false.mean() if game == "hinge" else F.softplus(-false).mean()


class LastLayer:
    """The decoder's last convolution, whose input is kept until its gradients are measured: they come from that.

    `norms` needs no second backward pass through the perceptual network or the discriminator: their gradients at the
    reconstruction have met in `Balance.split`, and only this layer lies between.
    """

    def __init__(self, model: Any) -> None:
        behind_patches = isinstance(model, PatchAutoencoder)
        self.layer: nn.Conv2d = (model.core if behind_patches else model).decoder.conv_out
        self.patch: int = model.config.patch if behind_patches else 1
        self.keeping = True
        self._input: Tensor | None = None
        self.layer.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._input = arguments[0].detach() if self.keeping and torch.is_grad_enabled() else None

    def forget(self) -> None:
        """Let the input go."""
        self._input = None

    def norms(self, *gradients: Tensor) -> list[Tensor]:
        """|dL / dW| for each dL / d(reconstruction) [b, 3, H, W]."""
        assert self._input is not None, "the decoder did not run"
        x, shape, padding = self._input.float(), self.layer.weight.shape, self.layer.padding
        return [
            conv2d_weight(x, shape, F.pixel_unshuffle(g.float(), self.patch), padding=padding).norm() for g in gradients
        ]


class Balance:
    """lambda, measured where the two gradients meet, once per step."""

    def __init__(self, last_layer: LastLayer, max_weight: float) -> None:
        self.last_layer, self.max_weight = last_layer, max_weight
        self.factor = 0.0
        """The adversarial loss's share of lambda: weight times ramp."""
        self.share = 1.0
        """A batch's part of a step, by which its gradients arrive divided."""
        self.weight: Tensor | None = None
        """lambda of this step, or None where it was not measured yet."""

    def measure(self, distortion: Tensor, adversarial: Tensor) -> Tensor:
        """lambda from both gradients at the reconstruction; the mean over ranks."""
        first, second = self.last_layer.norms(distortion / self.share, adversarial / self.share)
        weight = (first / (second + 1e-4)).clamp(max=self.max_weight)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(weight)
            weight = weight / torch.distributed.get_world_size()
        return weight

    def split(self, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstruction twice, for the distortion and for the discriminator.

        On the way back it receives g_distortion + factor lambda g_adversarial.
        """
        return _Meet.apply(reconstruction, self)


class _Meet(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reconstruction: Tensor, balance: Balance) -> tuple[Tensor, Tensor]:
        ctx.balance = balance
        return reconstruction.view_as(reconstruction), reconstruction.view_as(reconstruction)

    @staticmethod
    def backward(ctx: Any, distortion: Tensor, adversarial: Tensor) -> tuple[Tensor, None]:
        balance: Balance = ctx.balance
        if balance.weight is None:
            balance.weight = balance.measure(distortion, adversarial)
        balance.last_layer.forget()
        return distortion + balance.factor * balance.weight * adversarial, None
