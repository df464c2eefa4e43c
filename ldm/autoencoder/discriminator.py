"""The adversarial loss of stage 1: a patch discriminator, its loss, the autoencoder's loss, and the adaptive weight.

The adaptive weight lambda scales the adversarial gradient to the norm of the distortion gradient at the decoder's last
layer W:

    lambda = |dL_distortion / dW| / (|dL_adversarial / dW| + 1e-4),   at most `max_weight`

Source: Isola et al. 2017, arXiv:1611.07004 (patches); Esser et al. 2021, arXiv:2012.09841, eq. 7 (lambda).
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ldm.autoencoder.patch import PatchAutoencoder

GanLoss = Literal["hinge", "non_saturating"]


class PatchDiscriminator(nn.Module):
    """Patch discriminator: images [b, 3, H, W] in [-1, 1] -> logits [b, 1, h, w], one per overlapping patch.

    A positive logit classifies a patch as real.

    Args:
        channels: Width of the first level. Each further level doubles the width, up to 8 * channels.
        layers: Number of levels that halve the resolution. Three such levels give a receptive field of 70 x 70 pixels.
    """

    def __init__(self, channels: int = 32, layers: int = 3) -> None:
        super().__init__()
        widths = [min(channels * 2**level, channels * 8) for level in range(layers + 1)]
        modules: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, layers + 1):
            # Isola et al. use batch norm, with which an image's logits would depend on the other images in the batch
            # and would therefore differ between ranks and between real and fake batches.
            modules += [
                nn.Conv2d(widths[level - 1], widths[level], 4, stride=2 if level < layers else 1, padding=1),
                nn.GroupNorm(math.gcd(32, widths[level]), widths[level]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*modules, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def discriminator_loss(gan_loss: GanLoss, real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss, given the logits for real images and for reconstructions (fake).

        hinge              (E max(0, 1 - real) + E max(0, 1 + fake)) / 2
        non_saturating     E softplus(-real) + E softplus(fake)

    Source: Lim & Ye 2017, arXiv:1705.02894; Goodfellow et al. 2014, arXiv:1406.2661.
    """
    real, fake = real.float(), fake.float()
    if gan_loss == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(gan_loss: GanLoss, fake: Tensor) -> Tensor:
    """Return the autoencoder's adversarial loss, given the logits for reconstructions (fake).

    hinge              -E fake
    non_saturating     E softplus(-fake)
    """
    fake = fake.float()
    return -fake.mean() if gan_loss == "hinge" else F.softplus(-fake).mean()


class LastLayer:
    """Records the input of the decoder's last convolution, to compute the norms of gradients of the layer's weight.

    `gradient_norms` needs no second backward pass through the perceptual network or the discriminator, because it
    starts from the gradients at the reconstruction, which `AdaptiveWeight.split` provides.
    """

    def __init__(self, model: Any) -> None:
        has_patches = isinstance(model, PatchAutoencoder)
        decoder = (model.core if has_patches else model).decoder
        self.layer: nn.Conv2d = decoder.layers[-1] if isinstance(model, AutoencoderTiny) else decoder.conv_out
        self.patch: int = model.config.patch if has_patches else 1
        self.records_input = True
        self._input: Tensor | None = None
        self.layer.register_forward_pre_hook(self._record_input)

    def _record_input(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._input = arguments[0].detach() if self.records_input and torch.is_grad_enabled() else None

    def release_input(self) -> None:
        """Free the recorded input."""
        self._input = None

    def gradient_norms(self, *gradients: Tensor) -> list[Tensor]:
        """Return |dL / dW| for each gradient dL / d(reconstruction), [b, 3, H, W]."""
        assert self._input is not None, "the input of the decoder's last layer was not recorded"
        x, shape, padding = self._input.float(), self.layer.weight.shape, self.layer.padding
        return [
            conv2d_weight(x, shape, F.pixel_unshuffle(g.float(), self.patch), padding=padding).norm() for g in gradients
        ]


class AdaptiveWeight:
    """The adaptive weight lambda.

    lambda is computed once per step from the gradients of the distortion and of the adversarial loss with respect to
    the reconstruction.
    """

    def __init__(self, last_layer: LastLayer, max_weight: float) -> None:
        self.last_layer, self.max_weight = last_layer, max_weight
        self.factor = 0.0
        """Factor applied to lambda: the weight of the adversarial loss times the current value of its ramp (0 to 1)."""
        self.loss_scale = 1.0
        """Scale of the incoming gradients: 1 / number of accumulated batches."""
        self.weight: Tensor | None = None
        """lambda for the current step; None until it is computed."""

    def compute(self, distortion_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
        """Compute lambda from both gradients at the reconstruction, and average it over ranks."""
        gradients = distortion_gradient / self.loss_scale, adversarial_gradient / self.loss_scale
        distortion_norm, adversarial_norm = self.last_layer.gradient_norms(*gradients)
        weight = (distortion_norm / (adversarial_norm + 1e-4)).clamp(max=self.max_weight)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(weight)
            weight = weight / torch.distributed.get_world_size()
        return weight

    def split(self, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """Return two copies of the reconstruction: one for the distortion, one for the discriminator.

        In the backward pass, the reconstruction's gradient is g_distortion + factor * lambda * g_adversarial.
        """
        return _SplitGradient.apply(reconstruction, self)


class _SplitGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reconstruction: Tensor, adaptive_weight: AdaptiveWeight) -> tuple[Tensor, Tensor]:
        ctx.adaptive_weight = adaptive_weight
        return reconstruction.view_as(reconstruction), reconstruction.view_as(reconstruction)

    @staticmethod
    def backward(ctx: Any, distortion_gradient: Tensor, adversarial_gradient: Tensor) -> tuple[Tensor, None]:
        adaptive_weight: AdaptiveWeight = ctx.adaptive_weight
        if adaptive_weight.weight is None:
            adaptive_weight.weight = adaptive_weight.compute(distortion_gradient, adversarial_gradient)
        adaptive_weight.last_layer.release_input()
        return distortion_gradient + adaptive_weight.factor * adaptive_weight.weight * adversarial_gradient, None
