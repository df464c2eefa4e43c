"""Export latents to a safetensors file and decode them. The header contains the autoencoder's SHA-256."""

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
    """Write `mean` and `log_variance` [N, C, h, w] of every image to `out`, and return N."""
    starts = range(0, len(images), batch_size)
    moments = [autoencoder.encode(images.batch(range(start, min(start + batch_size, len(images))))) for start in starts]
    tensors = {
        "mean": torch.cat([mean.float().cpu() for mean, _ in moments]).contiguous(),
        "log_variance": torch.cat([log_variance.float().cpu() for _, log_variance in moments]).contiguous(),
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
    """Decode the means in a latents file. Return batches of images [b, 3, H, W] and the image names.

    Raises:
        UserError: The file is not a valid latents file, or a different autoencoder encoded it.
    """
    if not file.is_file():
        raise InputError("latents", file, "does not exist or is not a file")
    try:
        with safe_open(file, framework="pt") as reader:
            header, keys = reader.metadata() or {}, list(reader.keys())
            mean = reader.get_tensor("mean") if "mean" in keys else None
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError("latents", file, f"is not a valid safetensors file ({first_line(error)})") from error
    if mean is None or header.get("format") != FORMAT:
        raise InputError("latents", file, f"contains no latents of format {FORMAT}")
    names = header.get("names", "").split("\n")
    if mean.ndim != 4 or mean.shape[1] != autoencoder.channels or len(names) != len(mean) or not mean.isfinite().all():
        expected = f"finite latents with {autoencoder.channels} channels"
        actual = f"its shape is {list(mean.shape)}, with {len(names)} image names"
        raise InputError("latents", file, f"must contain {expected}, one per image name, but {actual}")
    weights, origin = autoencoder.weights_sha256(), header.get("autoencoder_sha256", "unknown")
    if weights != origin:
        hint = "Decode them with the run that encoded them."
        raise UserError(f"The latents in {file} belong to the autoencoder {origin[:12]}, not to {weights[:12]}. {hint}")
    return [autoencoder.decode(batch).cpu() for batch in mean.float().split(batch_size)], names
