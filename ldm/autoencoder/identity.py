"""Identity autoencoder for diffusion in pixel space, with the interface of diffusers' AutoencoderKL."""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from ldm.autoencoder.point_posterior import LOG_VARIANCE


class IdentityAutoencoder(ModelMixin, ConfigMixin):
    """Identity autoencoder with f = 1 and C = 3. The latents are the images themselves."""

    factor = 1

    @register_to_config
    def __init__(self, latent_channels: int = 3) -> None:
        super().__init__()
        # the only parameter, which gives the model a device; renaming it would break saved weights
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Return a point posterior at the images x, [b, 3, H, W]."""
        posterior = DiagonalGaussianDistribution(torch.cat([x, torch.full_like(x, LOG_VARIANCE)], dim=1))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True, generator: object = None) -> Any:
        """Return z, [b, 3, H, W], unchanged."""
        return DecoderOutput(sample=z) if return_dict else (z,)

    def forward(self, sample: Tensor) -> Any:
        return self.decode(sample)
