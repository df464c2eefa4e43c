"""Encode images to a safetensors file of latents, and decode such a file.

The file's header contains the SHA-256 of the autoencoder's weights.
"""

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
    """Encode all N images, write their `mean` and `log_variance`, each [N, C, h, w], to `out`, and return N."""
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
        UserError: The file is not a valid latents file, or its latents were encoded by a different autoencoder.
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
        expected = f"finite latents with {autoencoder.channels} channels and one image name per latent"
        actual = f"the latents have the shape {list(mean.shape)}, and the number of image names is {len(names)}"
        raise InputError("latents", file, f"must contain {expected}, but {actual}")
    weights, origin = autoencoder.weights_sha256(), header.get("autoencoder_sha256", "unknown")
    if weights != origin:
        rule = f"belong to the autoencoder with SHA-256 {origin[:12]}, not to this one ({weights[:12]})"
        raise UserError(f"The latents in {file} {rule}. Decode the latents with the run that encoded them.")
    return [autoencoder.decode(batch).cpu() for batch in mean.float().split(batch_size)], names
