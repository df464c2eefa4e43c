"""Embedded ICC colour profiles -> sRGB, by LittleCMS as Pillow's ImageCms calls it, with relative colorimetric intent.

What a model learns are sRGB values: without a conversion, the red of a photograph in Display P3 would come out duller
than it is. An image without a profile is sRGB.
"""

import io
import threading
from collections import Counter
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageCms

Profile = Literal["none", "sRGB", "converted", "unreadable"]
"""What became of an image's profile. `unreadable`: damaged or of another colour space, and treated as sRGB."""

_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space of a profile -> the mode of the images that it describes."""
_BUILDING = threading.Lock()


def to_srgb(image: Image.Image, icc_profile: bytes | None) -> tuple[Image.Image, Profile]:
    """An image of mode L, RGB or CMYK as sRGB, mode RGB.

    A profile of RGB also describes grey pixels, as equal amounts of red, green and blue.
    """
    if icc_profile is None:
        return image.convert("RGB"), "none"
    try:
        mode, transform = _transform(icc_profile)
        if image.mode != mode and (image.mode, mode) != ("L", "RGB"):
            return image.convert("RGB"), "unreadable"
        if transform is None:
            return image.convert("RGB"), "sRGB"
        converted = transform.apply(image if image.mode == mode else image.convert(mode))
    except (ImageCms.PyCMSError, OSError, ValueError, KeyError, TypeError):  # what LittleCMS and Pillow say of damage
        return image.convert("RGB"), "unreadable"
    return converted, "converted"


@lru_cache(maxsize=64)
def _transform(icc_profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode that a profile describes and how it becomes sRGB; None where it is sRGB, within rounding.

    Raises:
        Exception: one of those that `to_srgb` takes for an unreadable profile.
    """
    with _BUILDING:  # LittleCMS reports errors through state that threads share
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        mode = _SPACES[profile.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(
            profile, ImageCms.createProfile("sRGB"), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC
        )
    if mode != "RGB":
        return mode, transform
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    cube = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(18, -1, 3))
    moved = np.abs(np.asarray(transform.apply(cube)).astype(int) - np.asarray(cube)).max()
    return mode, transform if moved > 1 else None


def count_profiles(profiles: list[Profile]) -> dict[str, int]:
    """How many images were converted, and how many have a profile that cannot be read; {} where none has."""
    counts = Counter(profiles)
    return {kind: counts[kind] for kind in ("converted", "unreadable") if counts[kind]}
