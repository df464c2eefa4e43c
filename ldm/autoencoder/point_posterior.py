"""A posterior that is a point: diffusers' KL models without their noise."""

from typing import Any

import torch
from torch import Tensor, nn

LOG_VARIANCE = -30.0
"""Of a posterior that is a point as far as float32 can tell; what diffusers clamps a log-variance to."""


def moments_layer(model: Any) -> nn.Conv2d:
    """The layer whose second half of outputs is the log-variance of an AutoencoderKL, or of one behind patches."""
    core = getattr(model, "core", model)
    return core.quant_conv if getattr(core, "quant_conv", None) is not None else core.encoder.conv_out


def _log_variance(model: Any) -> tuple[Tensor, Tensor]:
    layer, channels = moments_layer(model), model.config.latent_channels
    assert layer.bias is not None
    return layer.weight[channels:], layer.bias[channels:]


@torch.no_grad()
def pin_posterior(model: nn.Module) -> None:
    """Make the log-variance LOG_VARIANCE whatever x is. A loss on the mean alone leaves it there: its gradient is 0."""
    weight, bias = _log_variance(model)
    weight.zero_()
    bias.fill_(2 * LOG_VARIANCE)  # clamped to it, and out of a weight decay's reach


def is_pinned(model: nn.Module) -> bool:
    """Whether `pin_posterior` made this model's posterior a point."""
    weight, bias = _log_variance(model)
    return bool((weight == 0).all() and (bias <= LOG_VARIANCE).all())
