"""One encoded image -> an RGB square of uint8, in every colour mode that Pillow reads."""

import io
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ldm.errors import UserError

Resize = Literal["crop", "pad", "squash"]
RESIZE_MODES: tuple[str, ...] = get_args(Resize)
WHITE = (255, 255, 255)


def decode(data: bytes | Image.Image, resolution: int, resize: Resize) -> np.ndarray:
    """The pixels [resolution, resolution, 3] of an encoded or already open image.

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: the image is not readable.
    """
    if isinstance(data, Image.Image):
        return np.asarray(resize_to_square(to_rgb(data), resolution, resize))
    if not data:
        raise ValueError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError("not an image in any format that Pillow reads") from None
    with image:
        # JPEG can drop octaves while it decodes; 3 pixels for each one kept leave the final filter its say.
        image.draft(None, (3 * resolution, 3 * resolution))
        return np.asarray(resize_to_square(to_rgb(image), resolution, resize))


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB: EXIF rotation applied, transparency laid on white, 16-bit grey scaled by 1/257.

    Raises:
        ValueError: for 32-bit integers outside 0..65535 and for floats: nothing says which value is white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bit_grey(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; save the image with 8 or 16 bits")
    if image.has_transparency_data:
        # Pillow's own RGBA -> RGB drops alpha and shows whatever colour lay hidden under it.
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (*WHITE, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _from_16_bit_grey(image: Image.Image) -> Image.Image:
    """65535 becomes 255. Pillow's own conversion clips at 255, which turns nearly every pixel white."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"grey values {grey.min()} to {grey.max()} do not fit in 16 bits")
    eight_bit = ((grey + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        eight_bit[grey == transparent] = 255
    return Image.fromarray(eight_bit).convert("RGB")


def resize_to_square(image: Image.Image, resolution: int, resize: Resize) -> Image.Image:
    """Antialiased resize of an RGB image: Lanczos, its support widened by the reduction factor.

    crop keeps the centre square, pad adds white bars, squash ignores the aspect ratio.
    """
    size = (resolution, resolution)
    if image.size == size:
        return image
    if resize == "crop":
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    if resize == "pad":
        return ImageOps.pad(image, size, Image.Resampling.LANCZOS, color=WHITE)
    return image.resize(size, Image.Resampling.LANCZOS)


def read_image(path: str, resolution: int, resize: Resize = "crop") -> Tensor:
    """One image file as float32 [1, 3, resolution, resolution] in [-1, 1].

    Raises:
        UserError: missing or not readable.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"image={path} is not a file.")
    try:
        pixels = decode(file.read_bytes(), resolution, resize)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"image={path} could not be read: {error}. Give a png, jpg or webp file.") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
