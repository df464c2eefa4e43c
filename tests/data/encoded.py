"""Images as the bytes of files, and the opening of prepared ones without a word."""

import io
from pathlib import Path

from PIL import Image

from ldm.data.images import ImageData, Source, prepare
from ldm.data.sources.image_folder import ImageFolder


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(number: int) -> bytes:
    """8 x 8 pixels of this red."""
    return encode(Image.new("RGB", (8, 8), (number, 0, 0)))


def open_quietly(source: Source | Path, cache_dir: Path, **options) -> ImageData:
    """A folder stands for the images in it."""
    source = ImageFolder(source) if isinstance(source, Path) else source
    return prepare(source, **{"resolution": 8, "cache_dir": cache_dir, "progress": False, **options})
