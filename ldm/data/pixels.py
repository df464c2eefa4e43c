"""Decoding of images in any colour mode supported by Pillow into square uint8 RGB arrays.

Image files can be untrusted. Only formats that Pillow decodes in this process are supported (not EPS, which it passes
to Ghostscript), and the size is checked before decoding. Only the first frame of an animation is used.
"""

import io
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

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
FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
}
"""Supported formats, by Pillow's names, and the suffixes of their files."""
IMAGE_SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
BitDepth = Literal[16, 14, 12, 10]
"""Number of bits used in 16-bit grey images: 2^bits - 1 is white."""
MODES = {
    "1": "black and white",
    "L": "grey",
    "La": "grey",
    "LA": "grey",
    "P": "palette",
    "PA": "palette",
    "CMYK": "CMYK",
    "YCbCr": "YCbCr",
    "LAB": "Lab",
    "HSV": "HSV",
    "I": "16-bit grey",
}
"""Names of Pillow's image modes that are converted to RGB. All modes I;16* are 16-bit grey."""
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


class BadImageError(ValueError):
    """An image that breaks one of our rules.

    Args:
        kind: The rule in a few words, under which skipped images are counted.
        reason: The rule with the values of this image.
    """

    def __init__(self, kind: str, reason: str) -> None:
        self.kind = kind
        super().__init__(reason)


@dataclass(frozen=True)
class Decoded:
    """The sRGB pixels [H, W, 3] of an image, and how they were obtained."""

    pixels: np.ndarray
    profile: Profile
    mode: str | None
    """A name from MODES if the image was converted from another mode than RGB."""
    is_transparent: bool
    """True if the image has transparent pixels or an alpha channel, and was put on white."""
    max_grey: int | None
    """Largest value of a 16-bit grey image; None for other images."""


def decode(data: bytes | Image.Image, resolution: int, resize: Resize, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the sRGB pixels [resolution, resolution, 3] of an encoded or open image. See `read_pixels` for errors."""
    return read_pixels(data, resolution, resize, max_pixels).pixels


def read_pixels(
    data: bytes | Image.Image,
    resolution: int,
    resize: Resize,
    max_pixels: int = MAX_PIXELS,
    bit_depth: BitDepth = 16,
) -> Decoded:
    """Decode an image and resize it to [resolution, resolution, 3] sRGB pixels.

    Raises:
        Exception: the image is unreadable. Pillow's plugins can raise anything on invalid data, from struct.error to
            IndexError. Violations of our own rules, such as `max_pixels`, raise BadImageError.
    """
    image = data if isinstance(data, Image.Image) else _open(data, max_pixels)
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise BadImageError("too small", f"{width} x {height} pixels: each side must have at least {MIN_SIDE} pixels")
    if width * height > max_pixels:
        raise BadImageError(
            "too large", f"{width} x {height} pixels exceed the limit of {max_pixels} pixels (max_pixels)"
        )
    # JPEG can be decoded at a reduced scale. The final filter needs no more than 3 decoded pixels per output pixel.
    image.draft(None, (3 * resolution, 3 * resolution))
    mode, is_transparent = image.mode, image.has_transparency_data
    is_deep = mode == "I" or mode.startswith("I;16")
    with _large_image_lock if image.width * image.height > LARGE_PIXELS else nullcontext():
        if isinstance(data, bytes):
            image = _correct_colour_key(image, data)
        rgb, profile = to_rgb(image, bit_depth)
        max_grey = int(np.asarray(image).max()) if is_deep else None
        pixels = np.asarray(resize_to_square(rgb, resolution, resize))
    return Decoded(pixels, profile, MODES.get("I" if is_deep else mode), is_transparent, max_grey)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise BadImageError("empty file", "the file is empty")
    try:
        return Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError:
        reason = f"not an image in a supported format ({', '.join(_formats())}), or damaged"
        raise BadImageError("not an image", reason) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"the size exceeds the limit of {max_pixels} pixels (max_pixels): {error}"
        raise BadImageError("too large", reason) from error


def _correct_colour_key(image: Image.Image, data: bytes) -> Image.Image:
    """Apply the transparent colour of a PNG file where Pillow compares it with samples of another bit depth.

    Pillow scales 2- and 4-bit grey to 8 bits, and keeps only the high bytes of 16-bit RGB, but leaves the key as it is.
    """
    key = image.info.get("transparency")
    raw_mode = image.tile[0][3] if image.format == "PNG" and image.tile else None  # type: ignore[attr-defined]
    if raw_mode in ("L;2", "L;4") and isinstance(key, int):
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[raw_mode]
    if raw_mode != "RGB;16B" or not isinstance(key, tuple):
        return image
    low_bytes: Any = Image.open(io.BytesIO(data), formats=("PNG",))
    low_bytes.tile = [tile._replace(args="RGB;16L") for tile in low_bytes.tile]  # the second byte of each sample
    samples = np.asarray(image).astype(np.uint16) * 256 + np.asarray(low_bytes)
    alpha = Image.fromarray(np.where((samples == key).all(-1), 0, 255).astype(np.uint8))
    del image.info["transparency"]
    image.putalpha(alpha)
    return image


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # older Pillow versions support fewer formats


def to_rgb(image: Image.Image, bit_depth: BitDepth = 16) -> tuple[Image.Image, Profile]:
    """Convert an image to upright sRGB. Also return its colour profile status.

    Applies the EXIF orientation and the colour profile, composites transparent images onto white, and scales 16-bit
    grey so that 2^bit_depth - 1 is white.

    Raises:
        BadImageError: the pixels are floats, or integers outside 0..2^bit_depth - 1.
    """
    image.load()
    # Pillow sets it to None if it cannot decompress the profile
    icc_profile = image.info["icc_profile"] or b"" if "icc_profile" in image.info else None
    image = _upright(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return to_srgb(_from_16_bit_grey(image, bit_depth), icc_profile)
    if image.mode == "F":
        reason = "floating-point pixels have no defined white level; save the image with 8 or 16 bits"
        raise BadImageError("floating-point pixels", reason)
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


def _from_16_bit_grey(image: Image.Image, bit_depth: BitDepth) -> Image.Image:
    """Convert 16-bit grey to 8 bits, mapping 2^bit_depth - 1 to 255; Pillow would instead clip all values at 255."""
    grey, white = np.asarray(image).astype(np.int32), 2**bit_depth - 1
    if grey.min() < 0 or grey.max() > white:
        reason = f"grey values {grey.min()} to {grey.max()} do not fit in {bit_depth} bits (bit_depth)"
        raise BadImageError(f"grey values above {white}", reason)
    eight_bit = ((255 * grey + white // 2) // white).astype(np.uint8)
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
