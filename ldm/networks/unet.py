"""diffusers' UNets with the same call signature as `ldm.networks.dit.DiT`."""

from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor


class ImageUNet(UNet2DModel):
    """UNet2DModel, optionally class-conditional. The null class comes after the last class."""

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(sample, timestep, class_labels=label, return_dict=False)[0]


class TextUNet(UNet2DConditionModel):
    """UNet2DConditionModel with cross-attention to the caption's tokens; `pooled` is added to the time embedding."""

    def forward(self, sample: Tensor, timestep: Tensor, tokens: Tensor, mask: Tensor, pooled: Tensor) -> Tensor:
        return super().forward(
            sample,
            timestep,
            encoder_hidden_states=tokens.to(sample.dtype),
            encoder_attention_mask=mask,
            class_labels=pooled.to(sample.dtype),
            return_dict=False,
        )[0]


class StableDiffusionUNet(UNet2DConditionModel):
    """UNet2DConditionModel as in Stable Diffusion, which sees only the tokens of the caption, padding included."""

    def forward(self, sample: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
        states = tokens.to(sample.dtype)
        return super().forward(sample, timestep, encoder_hidden_states=states, return_dict=False)[0]


def unet(
    *,
    sample_size: int,
    in_channels: int,
    out_channels: int,
    text_dim: int | None = None,
    num_classes: int | None = None,
    block_out_channels: tuple[int, ...] = (128, 256),
    layers_per_block: int = 2,
    attention_levels: tuple[int, ...] = (1,),
    head_dim: int = 32,
    norm_num_groups: int = 32,
    scale_shift: bool = True,
) -> ImageUNet | TextUNet:
    """Build a UNet that is conditioned on text if `text_dim` is set, on classes if `num_classes` is set, or on nothing.

    Args:
        block_out_channels: Channels of each level; each level after the first halves the resolution.
        attention_levels: Levels with self-attention and, if conditioned on text, cross-attention. Level 0 is the
            finest. The middle block always has attention.
        head_dim: Width of an attention head.
        scale_shift: True to scale and shift the normalised activations of every residual block by the embedding of
            the timestep and the condition (adaptive group normalisation; Dhariwal and Nichol 2021, arXiv:2105.05233,
            section 3); False to add the embedding to the activations.

    Raises:
        ValueError: The latent size cannot be halved at every level after the first.
    """
    levels = len(block_out_channels)
    _check_levels(levels, sample_size)
    common: dict[str, Any] = {
        "sample_size": sample_size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "block_out_channels": tuple(block_out_channels),
        "layers_per_block": layers_per_block,
        "norm_num_groups": norm_num_groups,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
    }
    has_attention = [level in attention_levels for level in range(levels)]
    if text_dim is not None:
        return TextUNet(
            **common,
            down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in has_attention),
            up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(has_attention)),
            cross_attention_dim=text_dim,
            # despite its name, this argument is the number of heads
            attention_head_dim=tuple(width // head_dim for width in block_out_channels),
            class_embed_type="projection",
            projection_class_embeddings_input_dim=text_dim,
        )
    return ImageUNet(
        **common,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in has_attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(has_attention)),
        attention_head_dim=head_dim,
        num_class_embeds=None if num_classes is None else num_classes + 1,
    )


def unet_sd(
    *,
    sample_size: int,
    in_channels: int,
    out_channels: int,
    text_dim: int | None = None,
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
    layers_per_block: int = 2,
    num_heads: int = 8,
    norm_num_groups: int = 32,
) -> StableDiffusionUNet:
    """Build the UNet of Stable Diffusion 1, with attention at all levels but the last.

    Source: Rombach et al. 2022, arXiv:2112.10752, and the config of its weights in diffusers.

    Raises:
        ValueError: The latent size cannot be halved at every level after the first, or there is no caption.
    """
    levels = len(block_out_channels)
    _check_levels(levels, sample_size)
    if text_dim is None:
        raise ValueError("the UNet of Stable Diffusion is conditioned on text, but there are no captions")
    return StableDiffusionUNet(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=out_channels,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        block_out_channels=tuple(block_out_channels),
        layers_per_block=layers_per_block,
        attention_head_dim=num_heads,  # despite its name, the number of heads
        norm_num_groups=norm_num_groups,
        cross_attention_dim=text_dim,
    )


def _check_levels(levels: int, sample_size: int) -> None:
    if sample_size % 2 ** (levels - 1):
        raise ValueError(
            f"a UNet with {levels} levels needs a latent size divisible by {2 ** (levels - 1)}; got {sample_size}"
        )
