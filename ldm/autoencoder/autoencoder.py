"""Stage 1 as the rest of the project sees it: images -> moments, latents -> images, and what is measured of them.

    z_raw ~ N(mean(x), exp(log_variance(x)))        z = (z_raw - latent_mean) / latent_std

per channel; the statistics come from all of the training split, unless those that a pretrained autoencoder publishes
are asked for. With a codebook the mean is what comes before quantisation and the variance is that of a point;
decoding quantises.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from ldm.autoencoder.identity import IdentityAutoencoder
from ldm.autoencoder.patch import PatchAutoencoder, PatchAutoencoderKL, PatchVQModel
from ldm.autoencoder.point_posterior import LOG_VARIANCE, is_pinned
from ldm.autoencoder.regularisers import flat, quantiser
from ldm.errors import InputError, UserError
from ldm.files.models import load_model
from ldm.files.untrusted import read_json, to_dataclass

TrainType = Literal["all", "decoder", "nothing"]

ENCODING = ("encoder", "quant_conv", "shortcut_in", "quantize")
"""The parts of a model that decide what a latent is."""


STATISTICS_FILE = "latents.json"
STATISTICS_FORMAT = 1
WITH_CODEBOOK = {"VQModel": VQModel, "PatchVQModel": PatchVQModel}
CLASSES = {
    "AutoencoderKL": AutoencoderKL,
    "PatchAutoencoderKL": PatchAutoencoderKL,
    **WITH_CODEBOOK,
    "IdentityAutoencoder": IdentityAutoencoder,
}


@dataclass(frozen=True)
class LatentStatistics:
    """Measured on a training split; `data` is the fingerprint of the images it was measured on."""

    latent_mean: list[float]
    latent_std: list[float]
    decoder_scale: list[float]
    """Standard deviation of x - decode(z) per colour, x in [-1, 1]: the scale of p(x | z)."""
    data: str
    weights_sha256: str


class Autoencoder:
    """A diffusers autoencoder with its factor f, its channels and, once measured, its latent statistics.

    >>> import torch
    >>> from ldm import Run
    >>> autoencoder = Run.open("runs/vae/demo").autoencoder()
    >>> mean, log_variance = autoencoder.encode(torch.zeros(1, 3, 8, 8))
    >>> z = autoencoder.standardise(mean)  # near N(0, 1) per channel: what the chain learns
    >>> autoencoder.decode(autoencoder.unstandardise(z)).shape
    torch.Size([1, 3, 8, 8])
    """

    def __init__(self, model: nn.Module, statistics: LatentStatistics | None = None) -> None:
        self.model: Any = model  # called as diffusers' AutoencoderKL is, which types cannot say
        self.statistics = statistics

    @property
    def factor(self) -> int:
        """Pixels per latent, along one side."""
        if isinstance(self.model, PatchAutoencoder | IdentityAutoencoder):
            return self.model.factor
        return 2 ** (len(self.model.config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        return self.model.config.get("vq_embed_dim") or self.model.config.latent_channels

    @property
    def is_identity(self) -> bool:
        """Whether the latents are the images: the chain is in pixel space."""
        return isinstance(self.model, IdentityAutoencoder)

    @property
    def has_density(self) -> bool:
        """Whether it defines q(z | x) and p(x | z), so that images have a likelihood: a KL autoencoder does."""
        return self.regulariser == "kl"

    @property
    def regulariser(self) -> str:
        """kl, vq (it has a codebook) or none (its posterior is a point)."""
        if self.has_codebook:
            return "vq"
        return "none" if self.is_identity or is_pinned(self.model) else "kl"

    @property
    def has_codebook(self) -> bool:
        """Whether decoding quantises."""
        return type(self.model).__name__ in WITH_CODEBOOK

    @property
    def codebook_size(self) -> int | None:
        """Codes, where there is a codebook."""
        return quantiser(self.model).n_e if self.has_codebook else None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> "Autoencoder":
        self.model.to(device)
        return self

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) for square images.

        Raises:
            InputError: f does not divide the resolution.
        """
        if resolution % self.factor:
            down, up = resolution // self.factor * self.factor, -(-resolution // self.factor) * self.factor
            near = f"{down} or {up}" if down else str(up)
            rule = f"must be a multiple of f = {self.factor}, the autoencoder's downsampling factor, such as {near}"
            raise InputError("resolution", resolution, rule)
        side = resolution // self.factor
        return self.channels, side, side

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[b, 3, H, W] in [-1, 1] -> mean and log-variance, each [b, C, h, w]."""
        encoded = self.model.encode(images.to(self.device))
        if self.has_codebook:
            return encoded.latents, torch.full_like(encoded.latents, LOG_VARIANCE)
        return encoded.latent_dist.mean, encoded.latent_dist.logvar

    @torch.no_grad()
    def decode(self, z_raw: Tensor) -> Tensor:
        """[b, C, h, w] -> [b, 3, H, W], clamped to [-1, 1]."""
        return self.model.decode(z_raw.to(self.device, self.model.dtype)).sample.clamp(-1, 1)

    @torch.no_grad()
    def codes(self, z_raw: Tensor) -> Tensor:
        """[b, C, h, w] -> the index of each location's code, [b, h, w], of an autoencoder with a codebook."""
        z_raw = z_raw.to(self.device, self.model.dtype)
        weight = quantiser(self.model).embedding.weight
        return torch.cdist(flat(z_raw), weight.float()).argmin(1).unflatten(0, (len(z_raw), *z_raw.shape[2:]))

    def standardise(self, z_raw: Tensor) -> Tensor:
        """z = (z_raw - mean) / std, per channel."""
        mean, std = self._moments(z_raw)
        return (z_raw - mean) / std

    def unstandardise(self, z: Tensor) -> Tensor:
        """z_raw = z std + mean, per channel."""
        mean, std = self._moments(z)
        return z * std + mean

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.statistics is None:
            raise ValueError("This autoencoder's latents were not measured yet: encode a training split first.")
        mean, std = (
            torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
            for values in (self.statistics.latent_mean, self.statistics.latent_std)
        )
        return mean, std

    def publish(self) -> None:
        """State the measured scale in the config of a diffusers model, as one shift and one factor over the channels.

        diffusers' pipelines read it there; the default of its class, 0.18215, is that of another model's latents.
        """
        statistics, config = self.statistics, self.model.config
        if statistics is None or "scaling_factor" not in config:
            return
        mean, std = (torch.tensor(x, dtype=torch.float64) for x in (statistics.latent_mean, statistics.latent_std))
        shift = mean.mean() if "shift_factor" in config else torch.zeros(())
        scale = (std.square() + (mean - shift).square()).mean().sqrt()
        stated = {"scaling_factor": 1 / scale.item(), "shift_factor": shift.item()}
        self.model.register_to_config(**{key: value for key, value in stated.items() if key in config})

    def weights_sha256(self) -> str:
        return weights_sha256(self.model)

    def save(self, folder: Path) -> None:
        """Write config.json, safetensors and, once measured, latents.json."""
        self.model.save_pretrained(folder)
        if self.statistics is not None:
            content = {"format": STATISTICS_FORMAT, **asdict(self.statistics)}
            (folder / STATISTICS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Autoencoder":
        """Read a folder of safetensors and JSON: ours, or any diffusers AutoencoderKL or VQModel.

        Raises:
            UserError: not such a folder, what `load_model` refuses, statistics of another format or of other weights.
        """
        config_file = folder / "config.json"
        if not config_file.is_file():
            raise UserError(f"{folder} holds no autoencoder: config.json is missing.")
        name = read_json(config_file).get("_class_name")
        if not isinstance(name, str) or name not in CLASSES:
            raise UserError(f"{folder} holds a {name}. Readable autoencoders: {', '.join(CLASSES)}.")
        autoencoder = cls(load_model(CLASSES[name], folder))
        statistics_file = folder / STATISTICS_FILE
        if statistics_file.is_file():
            content = read_json(statistics_file)
            if (found := content.pop("format", None)) != STATISTICS_FORMAT:
                raise UserError(f"{statistics_file} has format {found}; this version reads {STATISTICS_FORMAT}.")
            autoencoder.statistics = to_dataclass(LatentStatistics, content, statistics_file)
            weights = autoencoder.weights_sha256()
            if weights != autoencoder.statistics.weights_sha256:
                raise UserError(
                    f"{statistics_file} was measured on weights {autoencoder.statistics.weights_sha256[:12]}, "
                    f"but the weights beside it are {weights[:12]}. Train the autoencoder again, "
                    "or restore the file that belongs to these weights."
                )
        return autoencoder


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
