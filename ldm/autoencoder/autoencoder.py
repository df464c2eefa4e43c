"""The interface of stage 1: encode images to moments, decode latents to images, and standardise latents.

    z_raw ~ N(mean(x), exp(log_variance(x)))        z = (z_raw - latent_mean) / latent_std

latent_mean and latent_std have one value per channel. By default they are measured on the whole training split. A
pretrained autoencoder can use its published statistics instead. With a codebook, mean(x) is the encoder output before
quantisation, the variance is effectively zero, and `decode` quantises the latents.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from ldm.autoencoder.identity import IdentityAutoencoder
from ldm.autoencoder.patch import PatchAutoencoder, PatchAutoencoderKL, PatchVQModel
from ldm.autoencoder.point_posterior import DETERMINISTIC_CLASSES, LOG_VARIANCE, has_point_posterior, is_deterministic
from ldm.autoencoder.regularisers import quantiser, to_vectors
from ldm.autoencoder.sampling_decoder import ENCODER_MODULES, load_sampling_decoder, sampling_decoder_of, save_model
from ldm.errors import InputError, UserError
from ldm.files.models import load_model
from ldm.files.untrusted import read_json, to_dataclass

TrainablePart = Literal["all", "decoder", "nothing"]

STATISTICS_FILE = "latents.json"
STATISTICS_FORMAT = 1
VQ_CLASSES = {"VQModel": VQModel, "PatchVQModel": PatchVQModel}
AUTOENCODER_CLASSES = {
    "AutoencoderKL": AutoencoderKL,
    "PatchAutoencoderKL": PatchAutoencoderKL,
    **VQ_CLASSES,
    **DETERMINISTIC_CLASSES,
    "IdentityAutoencoder": IdentityAutoencoder,
}


@dataclass(frozen=True)
class LatentStatistics:
    """Latent statistics for a training split. `data` is the fingerprint of the image data."""

    latent_mean: list[float]
    latent_std: list[float]
    decoder_scale: list[float]
    """Standard deviation of x - decode(z) per colour channel, for x in [-1, 1]: the scale of p(x | z)."""
    data: str
    weights_sha256: str


class Autoencoder:
    """Wrapper around a diffusers autoencoder, with its latent statistics if they have been measured.

    >>> import torch
    >>> from ldm import Run
    >>> autoencoder = Run.open("runs/vae/demo").autoencoder()
    >>> mean, log_variance = autoencoder.encode(torch.zeros(1, 3, 8, 8))
    >>> z = autoencoder.standardise(mean)  # close to N(0, 1) per channel; the diffusion model is trained on z
    >>> autoencoder.decode(autoencoder.unstandardise(z)).shape
    torch.Size([1, 3, 8, 8])
    """

    def __init__(self, model: nn.Module, statistics: LatentStatistics | None = None) -> None:
        _check_channels(model)
        self.model: Any = model  # has the interface of diffusers' AutoencoderKL; there is no static type for it
        self.statistics = statistics

    @property
    def factor(self) -> int:
        """Downsampling factor f: pixels per latent location along each axis."""
        if isinstance(self.model, PatchAutoencoder | IdentityAutoencoder):
            return self.model.factor
        config = self.model.config
        return 2 ** (len(config.get("encoder_block_out_channels") or config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        """Number of latent channels."""
        return self.model.config.get("vq_embed_dim") or self.model.config.latent_channels

    @property
    def is_identity(self) -> bool:
        """True if the latents are the images themselves, for diffusion in pixel space."""
        return isinstance(self.model, IdentityAutoencoder)

    @property
    def has_density(self) -> bool:
        """True if q(z | x) and p(x | z) are densities, so that images have a likelihood. This holds only for 'kl'."""
        return self.regulariser == "kl"

    @property
    def regulariser(self) -> str:
        """Name of the regulariser: 'kl', 'vq' (with a codebook) or 'none' (with a point posterior)."""
        if self.has_codebook:
            return "vq"
        return "none" if self.is_identity or has_point_posterior(self.model) else "kl"

    @property
    def has_codebook(self) -> bool:
        """True if the model has a codebook, so that `decode` quantises the latents."""
        return type(self.model).__name__ in VQ_CLASSES

    @property
    def codebook_size(self) -> int | None:
        """Number of codes; None without a codebook."""
        return quantiser(self.model).n_e if self.has_codebook else None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> "Autoencoder":
        self.model.to(device)
        return self

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Return the latent shape (C, h, w) for square images of this resolution.

        Raises:
            InputError: The resolution is not a multiple of f.
        """
        if resolution % self.factor:
            lower, upper = resolution // self.factor * self.factor, -(-resolution // self.factor) * self.factor
            valid = f"{lower} or {upper}" if lower else str(upper)
            rule = f"must be a multiple of f = {self.factor}, the autoencoder's downsampling factor, such as {valid}"
            raise InputError("resolution", resolution, rule)
        side = resolution // self.factor
        return self.channels, side, side

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images [b, 3, H, W] in [-1, 1]. Return the mean and log-variance, each [b, C, h, w]."""
        encoded = self.model.encode(images.to(self.device))
        if self.has_codebook or is_deterministic(self.model):
            return encoded[0], torch.full_like(encoded[0], LOG_VARIANCE)
        return encoded.latent_dist.mean, encoded.latent_dist.logvar

    @torch.no_grad()
    def decode(self, z_raw: Tensor) -> Tensor:
        """Decode latents [b, C, h, w] to images [b, 3, H, W], clamped to [-1, 1]."""
        return self.model.decode(z_raw.to(self.device, self.model.dtype)).sample.clamp(-1, 1)

    @torch.no_grad()
    def decode_samples(self, z_raw: Tensor) -> Tensor:
        """Decode sampled latents like `decode`, but with the sampling decoder if there is one."""
        decoder = sampling_decoder_of(self.model)
        if decoder is None:
            return self.decode(z_raw)
        return decoder(z_raw.to(self.device, self.model.dtype)).clamp(-1, 1)

    @torch.no_grad()
    def codes(self, z_raw: Tensor) -> Tensor:
        """Return the index of the nearest code at each location, [b, C, h, w] -> [b, h, w]. Requires a codebook."""
        z_raw = z_raw.to(self.device, self.model.dtype)
        weight = quantiser(self.model).embedding.weight
        return torch.cdist(to_vectors(z_raw), weight.float()).argmin(1).unflatten(0, (len(z_raw), *z_raw.shape[2:]))

    def standardise(self, z_raw: Tensor) -> Tensor:
        """Return z = (z_raw - mean) / std, per channel."""
        mean, std = self._mean_and_std(z_raw)
        return (z_raw - mean) / std

    def unstandardise(self, z: Tensor) -> Tensor:
        """Return z_raw = z std + mean, per channel."""
        mean, std = self._mean_and_std(z)
        return z * std + mean

    def _mean_and_std(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.statistics is None:
            raise ValueError("This autoencoder has no latent statistics. Measure them on a training split first.")
        mean, std = (
            torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
            for values in (self.statistics.latent_mean, self.statistics.latent_std)
        )
        return mean, std

    def register_scaling(self) -> None:
        """Write the measured scale to the diffusers config, as a single shift and scaling factor for all channels.

        Pipelines in diffusers read both values from the config. The default scaling factor of the model class, 0.18215,
        would be wrong here because it is Stable Diffusion's.
        """
        statistics, config = self.statistics, self.model.config
        if statistics is None or "scaling_factor" not in config:
            return
        mean, std = (torch.tensor(x, dtype=torch.float64) for x in (statistics.latent_mean, statistics.latent_std))
        shift = mean.mean() if "shift_factor" in config else torch.zeros(())
        scale = (std.square() + (mean - shift).square()).mean().sqrt()
        scaling = {"scaling_factor": 1 / scale.item(), "shift_factor": shift.item()}
        self.model.register_to_config(**{key: value for key, value in scaling.items() if key in config})

    def weights_sha256(self) -> str:
        """Return the digest of the weights without those of the sampling decoder, on which no latents depend."""
        return weights_sha256(self.model, exclude="sampling_decoder.")

    def sampling_decoder_sha256(self) -> str | None:
        """Return the digest of the weights that decode samples, or None if the autoencoder's own decoder does."""
        decoder = sampling_decoder_of(self.model)
        return None if decoder is None else _sha256_of_weights(decoder.weights_at_level())

    def save(self, folder: Path) -> None:
        """Write config.json, the weights as safetensors, and the sampling decoder and latents.json if there are any."""
        save_model(self.model, folder)
        self.save_statistics(folder)

    def save_statistics(self, folder: Path) -> None:
        """Write latents.json if the statistics have been measured."""
        if self.statistics is not None:
            content = {"format": STATISTICS_FORMAT, **asdict(self.statistics)}
            (folder / STATISTICS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Autoencoder":
        """Load a folder written by `save`, or one of diffusers' autoencoders in AUTOENCODER_CLASSES.

        Raises:
            UserError: The folder contains no autoencoder, `load_model` rejects the folder, or the latent statistics
                have an unsupported format or belong to different weights.
        """
        config_file = folder / "config.json"
        if not config_file.is_file():
            raise UserError(f"{folder} is not an autoencoder folder: config.json is missing.")
        name = read_json(config_file).get("_class_name")
        if not isinstance(name, str) or name not in AUTOENCODER_CLASSES:
            supported = ", ".join(AUTOENCODER_CLASSES)
            raise UserError(f"{config_file} specifies the class {name}. Supported classes: {supported}.")
        model = load_model(AUTOENCODER_CLASSES[name], folder)
        load_sampling_decoder(model, folder)
        autoencoder = cls(model)
        statistics_file = folder / STATISTICS_FILE
        if statistics_file.is_file():
            content = read_json(statistics_file)
            if (version := content.pop("format", None)) != STATISTICS_FORMAT:
                supported = f"this version of ldm reads format {STATISTICS_FORMAT}"
                raise UserError(f"{statistics_file} has format {version}, but {supported}.")
            autoencoder.statistics = to_dataclass(LatentStatistics, content, statistics_file)
            for field, length in (("latent_mean", autoencoder.channels), ("latent_std", autoencoder.channels)):
                _check_statistics(statistics_file, field, getattr(autoencoder.statistics, field), length)
            _check_statistics(statistics_file, "decoder_scale", autoencoder.statistics.decoder_scale, 3)
            weights = autoencoder.weights_sha256()
            if weights != autoencoder.statistics.weights_sha256:
                raise UserError(
                    f"{statistics_file} belongs to weights with SHA-256 {autoencoder.statistics.weights_sha256[:12]}, "
                    f"but the weights in this folder have SHA-256 {weights[:12]}. Restore the matching latents.json, "
                    "or train the autoencoder again."
                )
        return autoencoder


def _check_channels(model: Any) -> None:
    for key in ("in_channels", "out_channels"):
        if (count := getattr(model, "config", {}).get(key, 3)) != 3:
            rule = "must be 3, because images have 3 colour channels. Use an autoencoder that was trained on RGB images"
            raise InputError(key, count, f"in the autoencoder's config.json {rule}")


def _check_statistics(file: Path, key: str, values: Any, length: int) -> None:
    """Raise an InputError unless `values` contains `length` finite numbers. A scale must also be positive."""
    is_scale = not key.endswith("mean")
    numbers = values if isinstance(values, list | tuple) else []
    if len(numbers) != length or not all(
        isinstance(x, int | float) and math.isfinite(x) and (x > 0 or not is_scale) for x in numbers
    ):
        rule = f"{length} finite {'positive ' if is_scale else ''}numbers" if length > 1 else "a positive number"
        raise InputError(key, values, f"in {file} must be {rule}. Restore the file that belongs to these weights")


def weights_sha256(model: nn.Module, exclude: str | None = None) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of all weights, independent of the file format.

    Args:
        exclude: Prefix of the names of weights that are left out.
    """
    weights = model.state_dict()
    return _sha256_of_weights({k: v for k, v in weights.items() if exclude is None or not k.startswith(exclude)})


def _sha256_of_weights(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def published_statistics(model: Any) -> tuple[list[float], list[float]] | None:
    """Return the per-channel mean and std of z_raw from the model's config, or None if it has no scaling factor.

        z = (z_raw - shift) * scaling                               shift defaults to 0 (SD 1, SD 2, SDXL)
        z = (z_raw - latents_mean) * scaling / latents_std          if the config has latents_mean and latents_std

    These statistics were measured on the authors' images, not yours. Networks pretrained on these latents expect them.
    Without an autoencoder, they are 0 and 1: images keep their range, [-1, 1].
    Source: diffusers' StableDiffusion(XL|3) and Flux pipelines.
    """
    config = model.config
    if isinstance(model, IdentityAutoencoder):
        return [0.0] * 3, [1.0] * 3
    channels = config.get("vq_embed_dim") or config.get("latent_channels")
    scaling = config.get("scaling_factor")
    if scaling is None:
        return None
    mean, std = config.get("latents_mean"), config.get("latents_std")
    file = Path("config.json")
    _check_statistics(file, "scaling_factor", [scaling], 1)
    if mean is not None and std is not None:
        _check_statistics(file, "latents_mean", mean, channels)
        _check_statistics(file, "latents_std", std, channels)
        return list(mean), [value / scaling for value in std]
    return [config.get("shift_factor") or 0.0] * channels, [1 / scaling] * channels


def set_trainable(model: nn.Module, part: TrainablePart) -> None:
    """Set requires_grad for every weight.

    Args:
        part: 'all' trains all weights, 'decoder' trains only those that do not affect the latents, and 'nothing' trains
            no weights.
    """
    for name, parameter in model.named_parameters():
        module = name.removeprefix("core.").split(".")[0]
        parameter.requires_grad_(part == "all" or (part == "decoder" and module not in ENCODER_MODULES))
