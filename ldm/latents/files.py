"""Latents in a safetensors file: moments by image, with the autoencoder's SHA-256 in the header."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.data.images import ImageData
from ldm.errors import InputError, UserError
from ldm.files.untrusted import first_line

FORMAT = "1"


def encode_file(autoencoder: Autoencoder, images: ImageData, out: Path, batch_size: int = 64) -> int:
    """Write `mean` and `log_variance` [N, C, h, w] of every image; returns N."""
    starts = range(0, len(images), batch_size)
    parts = [autoencoder.encode(images.batch(range(start, min(start + batch_size, len(images))))) for start in starts]
    tensors = {
        "mean": torch.cat([mean.float().cpu() for mean, _ in parts]).contiguous(),
        "log_variance": torch.cat([log_variance.float().cpu() for _, log_variance in parts]).contiguous(),
    }
    header = {
        "format": FORMAT,
        "autoencoder_sha256": autoencoder.weights_sha256(),
        "names": "\n".join(name.replace("\n", " ") for name in images.names),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out, metadata=header)
    return len(images)


def decode_file(autoencoder: Autoencoder, file: Path, batch_size: int = 64) -> tuple[list[Tensor], list[str]]:
    """Reconstruct images from the means in a file; batches [b, 3, H, W] and the images' names.

    Raises:
        UserError: not such a file, latents of another autoencoder, or no latents.
    """
    if not file.is_file():
        raise InputError("latents", file, "is not a file")
    try:
        with safe_open(file, framework="pt") as reader:
            header, keys = reader.metadata() or {}, list(reader.keys())
            mean = reader.get_tensor("mean") if "mean" in keys else None
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError("latents", file, f"is no safetensors file ({first_line(error)})") from error
    if mean is None or header.get("format") != FORMAT:
        raise InputError("latents", file, f"holds no latents of format {FORMAT}")
    names = header.get("names", "").split("\n")
    if mean.ndim != 4 or mean.shape[1] != autoencoder.channels or len(names) != len(mean) or not mean.isfinite().all():
        expected = f"finite latents of {autoencoder.channels} channels"
        raise InputError("latents", file, f"holds {list(mean.shape)} values for {len(names)} images, no {expected}")
    here, there = autoencoder.weights_sha256(), header.get("autoencoder_sha256", "unknown")
    if here != there:
        remedy = "Decode them with the run that encoded them."
        raise UserError(f"The latents in {file} belong to the autoencoder {there[:12]}, not to {here[:12]}. {remedy}")
    return [autoencoder.decode(part).cpu() for part in mean.float().split(batch_size)], names
