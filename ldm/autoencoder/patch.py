"""AutoencoderKL and VQModel behind a pixel-unshuffle, with a linear shortcut.

A patch of p x p pixels becomes 3 p^2 channels before the first convolution, so that all computation happens at a low
resolution, which is fast on a CPU. The shortcut is a linear autoencoder: its code is added to the encoder's mean, and
its reconstruction is added to the decoder's output. It is initialised with a PCA of the training images, so training
starts at the distortion of a PCA and the convolutions learn the residual. This module imports only torch and diffusers.
Source: Baldi & Hornik 1989 (PCA is the optimal linear autoencoder).
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

INITIAL_LOG_VARIANCE = -5.0


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Base class: a diffusers model (`core`) between a pixel-unshuffle and a pixel-shuffle, with a linear shortcut.

    f = patch * 2^(levels - 1). A subclass registers its config, builds its core model and passes it to `_wrap`.
    """

    core: Any

    def _wrap(self, core: Any, in_channels: int, latent_channels: int) -> None:
        self.factor = self.config.patch * 2 ** (len(self.config.block_out_channels) - 1)
        self.core = core
        if self.config.shortcut:
            patch_dim = in_channels * self.factor**2
            self.shortcut_in = nn.Conv2d(patch_dim, latent_channels, 1)
            self.shortcut_out = nn.Conv2d(latent_channels, patch_dim, 1)
            nn.init.orthogonal_(self.shortcut_in.weight)
            with torch.no_grad():
                self.shortcut_out.weight.copy_(self.shortcut_in.weight.transpose(0, 1))
            # initially, only the shortcut contributes to the output
            for layer in (core.quant_conv, core.decoder.conv_out):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def init_shortcut(self, images: Tensor) -> None:
        """Initialise the shortcut with a half-whitened PCA of the f x f patches of these images.

        Each component is divided by the square root of its standard deviation. Full whitening would amplify faint
        details to the magnitude of shapes and colours. Without whitening, faint details would vanish in the posterior
        noise.

        Args:
            images: [b, 3, H, W] in [-1, 1], with enough patches to estimate a covariance in 3 f^2 dimensions.

        Raises:
            ValueError: The number of latent channels exceeds the dimension of a patch.
        """
        patches = F.pixel_unshuffle(images, self.factor).permute(0, 2, 3, 1).flatten(0, 2).double()
        mean = patches.mean(0)
        variance, basis = torch.linalg.eigh(torch.cov((patches - mean).T))
        channels = self.config.latent_channels
        if channels > len(basis):
            raise ValueError(
                f"{channels} latent channels exceed the {len(basis)} dimensions of a patch of {self.factor} x "
                f"{self.factor} pixels. Use {len(basis)} channels or fewer."
            )
        basis = basis.flip(1)[:, :channels]
        gain = variance.flip(0)[:channels].clamp(min=1e-8) ** -0.25
        self.shortcut_in.weight.copy_((basis * gain).T[..., None, None])
        assert self.shortcut_in.bias is not None and self.shortcut_out.bias is not None
        self.shortcut_in.bias.copy_(-(mean @ basis) * gain)
        self.shortcut_out.weight.copy_((basis / gain)[..., None, None])
        self.shortcut_out.bias.copy_(mean)

    def _encode(self, x: Tensor) -> Tensor:
        """Return the core's encoding in float32, with the shortcut's code added to the first C channels (the mean)."""
        encoded = self.core.quant_conv(self.core.encoder(F.pixel_unshuffle(x, self.config.patch))).float()
        if not self.config.shortcut:
            return encoded
        linear = self.shortcut_in(F.pixel_unshuffle(x, self.factor)).float()
        channels = linear.shape[1]
        return torch.cat([encoded[:, :channels] + linear, encoded[:, channels:]], dim=1)

    def _decode(self, z: Tensor) -> Tensor:
        """Decode [b, C, h, w] to [b, 3, f h, f w] in float32, not clamped."""
        patches = self.core.decoder(self.core.post_quant_conv(z)).float()
        sample = F.pixel_shuffle(patches, self.config.patch)
        if self.config.shortcut:
            sample = sample + F.pixel_shuffle(self.shortcut_out(z).float(), self.factor)
        return sample


class PatchAutoencoderKL(PatchAutoencoder):
    """A KL autoencoder with the interface of diffusers' AutoencoderKL.

    Args:
        patch: Patch size of the pixel-unshuffle; 1 disables the unshuffle.
        block_out_channels: Width of each level; each level after the first halves the resolution.
        shortcut: If True, add the linear shortcut, which `init_shortcut` initialises from images.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        patch: int = 4,
        latent_channels: int = 16,
        block_out_channels: tuple[int, ...] = (128,),
        layers_per_block: int = 1,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = False,
        shortcut: bool = True,
        sample_size: int = 32,
    ) -> None:
        super().__init__()
        core = AutoencoderKL(
            **_core_options(in_channels, patch, block_out_channels, layers_per_block, norm_num_groups, sample_size),
            latent_channels=latent_channels,
            mid_block_add_attention=mid_block_add_attention,
        )
        self._wrap(core, in_channels, latent_channels)
        if shortcut:
            with torch.no_grad():  # a narrow posterior, so that training starts at the distortion of a PCA
                core.quant_conv.bias[latent_channels:] = INITIAL_LOG_VARIANCE

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Encode images [b, 3, H, W] in [-1, 1] to a posterior over latents [b, C, H/f, W/f], in float32."""
        posterior = DiagonalGaussianDistribution(self._encode(x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True, generator: object = None) -> Any:
        """Decode latents [b, C, h, w] to images [b, 3, f h, f w] in float32, not clamped."""
        sample = self._decode(z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor) -> Any:
        """Reconstruct images from the mean of their posterior."""
        return self.decode(self.encode(sample).latent_dist.mode())


class PatchVQModel(PatchAutoencoder):
    """A vector-quantised autoencoder with the interface of diffusers' VQModel: `decode` quantises the latents.

    Args:
        latent_channels: Channels of the latents and of the codes.
        num_vq_embeddings: Number of codes.
        vq_embed_dim: None or `latent_channels`; included for compatibility with diffusers' configs.

    Raises:
        ValueError: vq_embed_dim differs from latent_channels.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        patch: int = 4,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (128,),
        layers_per_block: int = 1,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = False,
        shortcut: bool = True,
        sample_size: int = 32,
        num_vq_embeddings: int = 1024,
        vq_embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        if vq_embed_dim not in (None, latent_channels):
            raise ValueError(f"vq_embed_dim={vq_embed_dim} must equal latent_channels={latent_channels}.")
        core = VQModel(
            **_core_options(in_channels, patch, block_out_channels, layers_per_block, norm_num_groups, sample_size),
            latent_channels=latent_channels,
            vq_embed_dim=latent_channels,
            num_vq_embeddings=num_vq_embeddings,
            mid_block_add_attention=mid_block_add_attention,
        )
        self._wrap(core, in_channels, latent_channels)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Encode images [b, 3, H, W] in [-1, 1] to unquantised latents [b, C, H/f, W/f], in float32."""
        latents = self._encode(x)
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(self, h: Tensor, force_not_quantize: bool = False, return_dict: bool = True) -> Any:
        """Quantise latents [b, C, h, w] and decode them to images [b, 3, f h, f w] in float32, not clamped.

        force_not_quantize=True skips the quantisation.
        """
        sample = self._decode(h if force_not_quantize else self.core.quantize(h)[0])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor) -> Any:
        """Reconstruct images from their quantised latents."""
        return self.decode(self.encode(sample).latents)


def _core_options(
    in_channels: int,
    patch: int,
    block_out_channels: tuple[int, ...],
    layers_per_block: int,
    norm_num_groups: int,
    sample_size: int,
) -> dict[str, Any]:
    """Return the constructor arguments that both core models share. The core's channels are the values of a patch."""
    levels = len(block_out_channels)
    return {
        "in_channels": in_channels * patch**2,
        "out_channels": in_channels * patch**2,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(block_out_channels),
        "layers_per_block": layers_per_block,
        "norm_num_groups": norm_num_groups,
        "sample_size": sample_size // patch,
    }
