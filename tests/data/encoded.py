"""Helpers that encode images in memory and prepare a source without a progress bar."""

import io
from pathlib import Path

from PIL import Image

from ldm.data.images import ImageData, Source, prepare
from ldm.data.sources.image_folder import ImageFolder


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(red: int) -> bytes:
    """Encode an 8 x 8 image with the colour (red, 0, 0)."""
    return encode(Image.new("RGB", (8, 8), (red, 0, 0)))


def prepare_quietly(source: Source | Path, cache_dir: Path, **options) -> ImageData:
    """Prepare a source, or the images in a folder, without a progress bar."""
    source = ImageFolder(source) if isinstance(source, Path) else source
    return prepare(source, **{"resolution": 8, "cache_dir": cache_dir, "progress": False, **options})
