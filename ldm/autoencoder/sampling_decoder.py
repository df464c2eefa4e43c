"""The sampling decoder: a second decoder, for samples, which is robust to noise in the latents.

    z_raw + level * scale * eps,  eps ~ N(0, I),  level = decoder_noise * |n|,  n ~ N(0, 1)

Sampled latents contain small errors, which a decoder trained only on the latents of images amplifies, for example into
specks on a plain background. This decoder starts as a copy of the trained first decoder, and is trained on the latents
of the trained encoder with added noise. The first decoder still decodes reconstructions and determines the likelihood.
The noise level is an input: a bias after the first convolution, 0 at level 0. After training, a fixed level is chosen
for samples, whose own level is unknown.
Source: Zheng et al. 2025, arXiv:2510.11690 (noise-augmented decoding; there, a single decoder decodes everything).
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.files.untrusted import first_line
from ldm.metrics.image import psnr

SAMPLING_DECODER_FILE = "sampling_decoder.safetensors"
FIRST_DECODER_FILE = "first_decoder.safetensors"
"""Decoder for reconstructions, if the decoder in the model's own file is the sampling decoder."""
ENCODER_MODULES = ("encoder", "quant_conv", "shortcut_in", "quantize")
"""Submodules of an autoencoder that determine the latents of an image."""
HIDDEN_DIM = 32
LEVELS = tuple(i / 10 for i in range(1, 11))
"""Candidates for the fixed level, relative to decoder_noise."""


class SamplingDecoder(nn.Module):
    """A copy of an autoencoder's decoder, with the noise level as an additional input.

    Args:
        model: An AutoencoderKL or a PatchAutoencoderKL.
        scale: Standard deviation of the noise at level 1, for each latent channel.
    """

    scale: Tensor
    level: Tensor
    """The level at which samples are decoded."""

    def __init__(self, model: Any, scale: Sequence[float]) -> None:
        super().__init__()
        self.decoder = _without_encoder(model)
        first: nn.Conv2d = getattr(self.decoder, "core", self.decoder).decoder.conv_in
        self.hidden = nn.Linear(2, HIDDEN_DIM)
        self.bias = nn.Linear(HIDDEN_DIM, first.out_channels, bias=False)
        nn.init.zeros_(self.bias.weight)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("level", torch.zeros(()))
        self._current_bias: Tensor | None = None
        first.register_forward_hook(self._add_bias)

    @torch.no_grad()
    def restart_from(self, model: Any) -> None:
        """Restart training from the current weights of the autoencoder's decoder."""
        own = self.decoder.state_dict()
        self.decoder.load_state_dict({name: value for name, value in model.state_dict().items() if name in own})
        self.bias.weight.zero_()

    def forward(self, z_raw: Tensor, level: Tensor | None = None) -> Tensor:
        """Decode latents [b, C, h, w] to images [b, 3, H, W], not clamped.

        Args:
            level: Noise levels, [b] or [1]; None uses the chosen level.
        """
        self._current_bias = self._bias_at(self.level[None] if level is None else level)[:, :, None, None]
        try:
            return self.decoder.decode(z_raw).sample
        finally:
            self._current_bias = None

    def _bias_at(self, level: Tensor) -> Tensor:
        features = torch.stack([level, level.square()], dim=1).to(self.bias.weight.dtype)
        hidden, hidden_at_0 = (F.silu(self.hidden(x)) for x in (features, torch.zeros_like(features)))
        return self.bias(hidden - hidden_at_0)

    @torch.no_grad()
    def weights_at_level(self) -> dict[str, Tensor]:
        """Return the decoder's weights with the chosen level as part of the first convolution's bias."""
        weights = dict(self.decoder.state_dict())
        name = next(name for name in weights if name.endswith("decoder.conv_in.bias"))
        weights[name] = weights[name] + self._bias_at(self.level[None])[0]
        return weights

    def _add_bias(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        assert self._current_bias is not None
        return output + self._current_bias.to(output.dtype)

    def add_noise(self, z_raw: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """Add noise [b, C, h, w] from N(0, I) to latents, at the levels [b]."""
        return z_raw + level[:, None, None, None] * self.scale[:, None, None] * noise

    @torch.no_grad()
    def choose_level(
        self, images: Tensor, z_raw: Tensor, decoder_noise: float, generator: torch.Generator, batch_size: int = 64
    ) -> None:
        """Choose the fixed level with the highest mean PSNR on latents whose noise levels vary as in training.

        The mean squared error would be dominated by the highest noise levels, and the samples would be too blurry.

        Args:
            images: Training images, [n, 3, H, W].
            z_raw: Their latents, [n, C, h, w].
        """
        levels = decoder_noise * torch.randn(len(z_raw), generator=generator).abs().to(z_raw)
        z_raw = self.add_noise(z_raw, levels, torch.randn(z_raw.shape, generator=generator).to(z_raw))
        mean_psnr = {}
        for relative_level in LEVELS:
            level = z_raw.new_full((1,), relative_level * decoder_noise)
            decoded = torch.cat([self(batch, level) for batch in z_raw.split(batch_size)]).clamp(-1, 1)
            mean_psnr[level] = psnr(images.to(decoded), decoded).mean().item()
        self.level.copy_(max(mean_psnr, key=mean_psnr.__getitem__)[0])


def decode_noisy(decoder: SamplingDecoder, z_raw: Tensor, decoder_noise: float, noise: Callable[..., Tensor]) -> Tensor:
    """Add noise of random levels to latents, which get no gradient, and decode them as in training.

    Args:
        z_raw: [b, C, h, w].
        noise: Maps a shape to a sample from N(0, I).
    """
    level = decoder_noise * noise((len(z_raw),)).abs()
    return decoder(decoder.add_noise(z_raw.detach(), level, noise(z_raw.shape)), level)


def sampling_decoder_of(model: nn.Module) -> SamplingDecoder | None:
    """Return the sampling decoder of an autoencoder, or None if it has none."""
    return getattr(model, "sampling_decoder", None)


def model_for_samples(model: Any) -> Any:
    """Return a copy of an autoencoder whose decoder is the sampling decoder at its chosen level, if it has one."""
    if (decoder := sampling_decoder_of(model)) is None:
        return model
    result = copy.deepcopy(model)
    result.sampling_decoder = None
    result.load_state_dict({**result.state_dict(), **decoder.weights_at_level()})
    return result


def save_first_decoder(model: Any, folder: Path) -> None:
    """Write the decoder for reconstructions next to the files of `model_for_samples`, if they have another decoder."""
    if (decoder := sampling_decoder_of(model)) is not None:
        weights = model.state_dict()
        save_file({name: weights[name] for name in decoder.decoder.state_dict()}, folder / FIRST_DECODER_FILE)


def save_model(model: Any, folder: Path) -> None:
    """Write an autoencoder in diffusers' format, and its sampling decoder, if it has one, to a file of its own.

    diffusers and earlier versions of ldm therefore open the folder as an autoencoder without a sampling decoder.
    """
    decoder = sampling_decoder_of(model)
    model.sampling_decoder = None
    try:
        model.save_pretrained(folder)
    finally:
        model.sampling_decoder = decoder
    if decoder is not None:
        save_file(decoder.state_dict(), folder / SAMPLING_DECODER_FILE)


def load_sampling_decoder(model: Any, folder: Path) -> None:
    """Add the sampling decoder in a folder to the autoencoder, if there is one.

    The folder was written by `save_model`, or by `model_for_samples` and `save_first_decoder`. In the latter case, the
    model's decoder becomes the sampling decoder, and the first decoder replaces it.

    Raises:
        UserError: A file is damaged, contains non-finite values, or belongs to a different autoencoder.
    """
    file = next(
        (folder / name for name in (FIRST_DECODER_FILE, SAMPLING_DECODER_FILE) if (folder / name).is_file()), None
    )
    if file is None:
        return
    decoder = SamplingDecoder(model, [1.0] * model.config.latent_channels)
    try:
        state = load_file(file)
        if not all(value.isfinite().all() for value in state.values()):
            raise ValueError("a value is not finite")
        if file.name == FIRST_DECODER_FILE:
            if state.keys() != decoder.decoder.state_dict().keys():
                raise ValueError("it does not have the weights of a decoder")
            model.load_state_dict({**model.state_dict(), **state})
        else:
            decoder.load_state_dict(state)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        remedy = "Restore the file that training wrote, or delete it to decode everything with the autoencoder itself."
        raise UserError(f"{file} is not a decoder of this autoencoder ({first_line(error)}). {remedy}") from error
    model.sampling_decoder = decoder.eval()


def _without_encoder(model: Any) -> Any:
    """Return a copy of an autoencoder without the modules of its encoder."""
    model = copy.deepcopy(model)
    model.sampling_decoder = None
    for module in (model, getattr(model, "core", model)):
        for name in ENCODER_MODULES:
            if name in module._modules:
                setattr(module, name, None)
    return model
