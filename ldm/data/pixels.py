"""Decoding of images in any colour mode supported by Pillow into square uint8 RGB arrays.

Image files can be untrusted. Only formats that Pillow decodes in this process are supported (not EPS, which it passes
to Ghostscript), and the size is checked before decoding. Only the first frame of an animation is used.
"""

import io
import threading
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field
from torch import Tensor

from ldm.data.colour import Profile, to_srgb
from ldm.errors import InputError
from ldm.files.reading import read_file

Resize = Annotated[Literal["crop", "pad", "squash"], Field()]
WHITE = (255, 255, 255)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
MIN_SIDE = 2
"""Minimum side length, which rejects spacers and tracking pixels. Other small images are scaled up."""

MAX_PIXELS = 89_478_485
"""Default for `data.max_pixels`, the maximum number of pixels per image. This is also Pillow's own limit."""

LARGE_PIXELS = 2**24
"""Images with more pixels are decoded one at a time, so that memory does not grow with the number of threads."""

_large_image_lock = threading.Lock()
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes | Image.Image, resolution: int, resize: Resize, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the sRGB pixels [resolution, resolution, 3] of an encoded or open image. See `read_pixels` for errors."""
    pixels, _ = read_pixels(data, resolution, resize, max_pixels)
    return pixels


def read_pixels(
    data: bytes | Image.Image, resolution: int, resize: Resize, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, Profile]:
    """Return the sRGB pixels [resolution, resolution, 3] of an image, and its colour profile status.

    Raises:
        Exception: the image is unreadable. Pillow's plugins can raise anything on invalid data, from struct.error to
            IndexError. Violations of our own rules, such as `max_pixels`, raise ValueError.
    """
    image = data if isinstance(data, Image.Image) else _open(data, max_pixels)
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"{width} x {height} pixels: each side must have at least {MIN_SIDE} pixels")
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels exceed the limit of {max_pixels} pixels (max_pixels)")
    # JPEG can be decoded at a reduced scale. The final filter needs no more than 3 decoded pixels per output pixel.
    image.draft(None, (3 * resolution, 3 * resolution))
    with _large_image_lock if image.width * image.height > LARGE_PIXELS else nullcontext():
        rgb, profile = to_rgb(image)
        return np.asarray(resize_to_square(rgb, resolution, resize)), profile


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise ValueError("the file is empty")
    try:
        return Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError:
        raise ValueError(f"not an image in a supported format ({', '.join(_formats())}), or damaged") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"the size exceeds the limit of {max_pixels} pixels (max_pixels): {error}") from error


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # older Pillow versions support fewer formats


def to_rgb(image: Image.Image) -> tuple[Image.Image, Profile]:
    """Convert an image to upright sRGB. Also return its colour profile status.

    Applies the EXIF orientation and the colour profile, composites transparent images onto white, and scales 16-bit
    grey by 1/257.

    Raises:
        ValueError: the pixels are floats or 32-bit integers outside 0..65535, for which no white level is defined.
    """
    image.load()
    # Pillow sets None if it cannot decompress the profile
    icc_profile = image.info["icc_profile"] or b"" if "icc_profile" in image.info else None
    image = _upright(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return to_srgb(_from_16_bit_grey(image), icc_profile)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; save the image with 8 or 16 bits")
    if image.has_transparency_data:
        # Pillow's own RGBA -> RGB conversion drops alpha, which reveals the hidden colour of transparent pixels.
        rgba = image.convert("RGBA")
        is_grey = image.mode in ("1", "L", "LA", "La")
        colours = image.convert("LA").getchannel("L") if is_grey else rgba.convert("RGB")
        rgb, profile = to_srgb(colours, icc_profile)
        rgb.putalpha(rgba.getchannel("A"))
        return Image.alpha_composite(Image.new("RGBA", rgb.size, (*WHITE, 255)), rgb).convert("RGB"), profile
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return to_srgb(image, icc_profile)


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, or return the image unchanged if its metadata cannot be read."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # Pillow raises errors of many types for damaged EXIF data
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _from_16_bit_grey(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey to 8 bits, mapping 65535 to 255. Pillow would clip at 255, making nearly all pixels white."""
    grey = np.asarray(image).astype(np.int32)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"grey values {grey.min()} to {grey.max()} do not fit in 16 bits")
    eight_bit = ((grey + 128) // 257).astype(np.uint8)
    colour_key = image.info.get("transparency")
    if isinstance(colour_key, int):
        eight_bit[grey == colour_key] = 255
    return Image.fromarray(eight_bit)


def resize_to_square(image: Image.Image, resolution: int, resize: Resize) -> Image.Image:
    """Resize an RGB image to a square with an antialiased Lanczos filter, widened by the reduction factor.

    crop keeps the centre square, pad adds white bars, squash ignores the aspect ratio.
    """
    size = (resolution, resolution)
    if image.size == size:
        return image
    if resize == "crop":
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    if resize == "pad":
        short, long = sorted(image.size)
        if round(short / long * resolution) == 0:  # Pillow would round the short side to zero pixels
            strip = (resolution, 1) if image.width == long else (1, resolution)
            image = image.resize(strip, Image.Resampling.LANCZOS)
        return ImageOps.pad(image, size, Image.Resampling.LANCZOS, color=WHITE)
    return image.resize(size, Image.Resampling.LANCZOS)


def read_image(path: str, resolution: int, resize: Resize = "crop") -> Tensor:
    """Read an image file as float32 [1, 3, resolution, resolution] in [-1, 1].

    Raises:
        UserError: the file is missing or cannot be read.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError("image", path, "is not a file")
    try:
        pixels = decode(read_file(file), resolution, resize)
    except Exception as error:  # Pillow can raise anything on invalid data
        raise InputError("image", path, f"could not be read: {error}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
