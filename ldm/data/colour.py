"""Conversion of embedded ICC colour profiles to sRGB with Pillow's ImageCms (LittleCMS), relative colorimetric intent.

Models are trained on sRGB values. Without conversion, the reds of a Display P3 photograph would look too dull.
Images without a profile are assumed to be sRGB.
"""

import io
import threading
from collections import Counter
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageCms

Profile = Literal["none", "sRGB", "converted", "unreadable"]
"""Status of an image's colour profile. `unreadable`: damaged or for a different colour space, so treated as sRGB."""

_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""ICC colour space -> Pillow image mode."""
_build_lock = threading.Lock()


def to_srgb(image: Image.Image, icc_profile: bytes | None) -> tuple[Image.Image, Profile]:
    """Convert an image of mode L, RGB or CMYK to sRGB in mode RGB. Also return its colour profile status.

    A grey image can have an RGB profile; it is then expanded to three equal channels before conversion.
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
    except (ImageCms.PyCMSError, OSError, ValueError, KeyError, TypeError):  # raised for damaged profiles
        return image.convert("RGB"), "unreadable"
    return converted, "converted"


@lru_cache(maxsize=64)
def _transform(icc_profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Return the image mode for a profile and its transform to sRGB (None if the profile is sRGB up to rounding).

    Raises:
        Exception: the profile is unreadable. `to_srgb` lists the exception types.
    """
    with _build_lock:  # LittleCMS reports errors through state shared between threads
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        mode = _SPACES[profile.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(
            profile, ImageCms.createProfile("sRGB"), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC
        )
    if mode != "RGB":
        return mode, transform
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    cube = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(18, -1, 3))
    largest_change = np.abs(np.asarray(transform.apply(cube)).astype(int) - np.asarray(cube)).max()
    return mode, transform if largest_change > 1 else None


def count_profiles(profiles: list[Profile]) -> dict[str, int]:
    """Count the images with converted and with unreadable profiles, omitting zeros."""
    counts = Counter(profiles)
    return {kind: counts[kind] for kind in ("converted", "unreadable") if counts[kind]}
