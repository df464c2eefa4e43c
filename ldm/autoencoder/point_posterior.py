"""Point posteriors: models without posterior noise, of diffusers' KL classes or without moments at all."""

from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderTiny
from torch import Tensor, nn

LOG_VARIANCE = -30.0
"""Lower bound to which diffusers clamps log-variances. In float32, it effectively gives a point posterior."""

DETERMINISTIC_CLASSES = {"AutoencoderDC": AutoencoderDC, "AutoencoderTiny": AutoencoderTiny}
"""Classes whose encoders output latents instead of moments."""


def is_deterministic(model: Any) -> bool:
    """Return True if the encoder outputs latents instead of moments."""
    return isinstance(model, tuple(DETERMINISTIC_CLASSES.values()))


def encode_to_mean(model: Any, images: Tensor) -> Tensor:
    """Return the posterior mean, or the latents of a deterministic encoder."""
    encoded = model.encode(images)
    return encoded[0] if is_deterministic(model) else encoded.latent_dist.mean


def moments_layer(model: Any) -> nn.Conv2d:
    """Return the layer that outputs the mean and the log-variance of an AutoencoderKL or a PatchAutoencoderKL."""
    core = getattr(model, "core", model)
    return core.quant_conv if getattr(core, "quant_conv", None) is not None else core.encoder.conv_out


def _log_variance_parameters(model: Any) -> tuple[Tensor, Tensor]:
    layer, channels = moments_layer(model), model.config.latent_channels
    assert layer.bias is not None
    return layer.weight[channels:], layer.bias[channels:]


@torch.no_grad()
def zero_posterior_noise(model: nn.Module) -> None:
    """Set the log-variance to LOG_VARIANCE for every input.

    Training with a loss that depends only on the mean does not change the log-variance, whose gradient is then 0.
    """
    if is_deterministic(model):
        return
    weight, bias = _log_variance_parameters(model)
    weight.zero_()
    bias.fill_(2 * LOG_VARIANCE)  # clamped to LOG_VARIANCE by diffusers; the margin allows for weight decay


def has_point_posterior(model: nn.Module) -> bool:
    """Return True if the model is deterministic, or if `zero_posterior_noise` was applied to it."""
    if is_deterministic(model):
        return True
    weight, bias = _log_variance_parameters(model)
    return bool((weight == 0).all() and (bias <= LOG_VARIANCE).all())
