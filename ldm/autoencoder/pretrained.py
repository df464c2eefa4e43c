"""What a pretrained autoencoder brings along: the published scale of its latents, and a part to leave as it is."""

from typing import Any, Literal

from torch import nn

TrainType = Literal["all", "decoder", "nothing"]
ENCODING = ("encoder", "quant_conv", "shortcut_in", "quantize")
"""The parts of a model that decide what a latent is."""


def published_statistics(model: Any) -> tuple[list[float], list[float]] | None:
    """Per-channel mean and standard deviation of z_raw that its makers scale latents by; None where it states none.

        z = (z_raw - shift) * scaling                               shift is 0 where none is stated (SD 1, 2, SDXL)
        z = (z_raw - latents_mean) * scaling / latents_std          per channel, where the config has both

    which are those of other images than yours; stable-diffusion networks expect latents of this scale.
    Source: diffusers' StableDiffusion(XL|3) and Flux pipelines.
    """
    config = model.config
    channels = config.get("vq_embed_dim") or config.get("latent_channels")
    scaling = config.get("scaling_factor")
    if scaling is None:
        return None
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return list(mean), [value / scaling for value in std]
    return [config.get("shift_factor") or 0.0] * channels, [1 / scaling] * channels


def choose_trained(model: nn.Module, part: TrainType) -> None:
    """Leave gradients to `all` weights, to those of the `decoder` (latents stay what they are), or to `nothing`."""
    for name, parameter in model.named_parameters():
        owner = name.removeprefix("core.").split(".")[0]
        parameter.requires_grad_(part == "all" or (part == "decoder" and owner not in ENCODING))
