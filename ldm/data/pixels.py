"""One encoded image -> an RGB square of uint8, in every colour mode that Pillow reads.

The bytes may come from anywhere: only formats that are decoded in this process are tried (no EPS, which Pillow hands to
Ghostscript), the size is checked before a pixel is decoded, and of an animation the first picture is taken.
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
"""A line or a point holds no picture: spacers and tracking pixels are left out, larger ones are scaled up."""

MAX_PIXELS = 89_478_485
"""Of an image, unless `data.max_pixels` says otherwise; Pillow's own limit."""

LARGE_PIXELS = 2**24
"""More are decoded one image at a time, so that memory does not grow with the number of threads."""

_large = threading.Lock()
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
    """The pixels [resolution, resolution, 3] in sRGB of an encoded or already open image; raises as `read_pixels`."""
    pixels, _ = read_pixels(data, resolution, resize, max_pixels)
    return pixels


def read_pixels(
    data: bytes | Image.Image, resolution: int, resize: Resize, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, Profile]:
    """The pixels [resolution, resolution, 3] in sRGB of an image, and what became of its colour profile.

    Raises:
        Exception: the image is not readable. On bad bytes Pillow's plugins raise anything, from struct.error to
            IndexError; ValueError for what breaks a rule of ours, such as more than `max_pixels`.
    """
    image = data if isinstance(data, Image.Image) else _open(data, max_pixels)
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"{width} x {height} pixels: a side has {MIN_SIDE} at least, or there is no picture")
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels are more than max_pixels, {max_pixels}, allows")
    # JPEG can drop octaves while it decodes; 3 pixels for each one kept leave the final filter its say.
    image.draft(None, (3 * resolution, 3 * resolution))
    with _large if image.width * image.height > LARGE_PIXELS else nullcontext():
        rgb, profile = to_rgb(image)
        return np.asarray(resize_to_square(rgb, resolution, resize)), profile


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise ValueError("the file is empty")
    try:
        return Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError:
        raise ValueError(f"not an image in a format that is read ({', '.join(_formats())}), or a damaged one") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"more than max_pixels, {max_pixels}, allows: {error}") from error


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # an older Pillow knows fewer


def to_rgb(image: Image.Image) -> tuple[Image.Image, Profile]:
    """Upright sRGB: EXIF rotation and colour profile applied, transparency laid on white, 16-bit grey scaled by 1/257.

    Raises:
        ValueError: for 32-bit integers outside 0..65535 and for floats: nothing says which value is white.
    """
    image.load()
    # Pillow leaves an empty one where the file has a profile that it cannot unpack
    icc_profile = image.info["icc_profile"] or b"" if "icc_profile" in image.info else None
    image = _upright(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return to_srgb(_from_16_bit_grey(image), icc_profile)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; save the image with 8 or 16 bits")
    if image.has_transparency_data:
        # Pillow's own RGBA -> RGB drops alpha and shows whatever colour lay hidden under it.
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
    """Turned as EXIF says. Metadata that cannot be read says nothing of the pixels: the image stays as it is."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _from_16_bit_grey(image: Image.Image) -> Image.Image:
    """8-bit grey: 65535 becomes 255. Pillow's own conversion clips at 255, which turns nearly every pixel white."""
    grey = np.asarray(image).astype(np.int32)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"grey values {grey.min()} to {grey.max()} do not fit in 16 bits")
    eight_bit = ((grey + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        eight_bit[grey == transparent] = 255
    return Image.fromarray(eight_bit)


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
        short, long = sorted(image.size)
        if round(short / long * resolution) == 0:  # Pillow would leave nothing of such a strip
            strip = (resolution, 1) if image.width == long else (1, resolution)
            image = image.resize(strip, Image.Resampling.LANCZOS)
        return ImageOps.pad(image, size, Image.Resampling.LANCZOS, color=WHITE)
    return image.resize(size, Image.Resampling.LANCZOS)


def read_image(path: str, resolution: int, resize: Resize = "crop") -> Tensor:
    """One image file as float32 [1, 3, resolution, resolution] in [-1, 1].

    Raises:
        UserError: missing or not readable.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError("image", path, "is not a file")
    try:
        pixels = decode(read_file(file), resolution, resize)
    except Exception as error:  # on bad bytes Pillow raises anything
        raise InputError("image", path, f"could not be read: {error}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
