"""Fashion-MNIST: 70,000 greyscale images of clothing in ten classes, 28 x 28 pixels.

Source: Xiao et al. 2017, arXiv:1708.07747. The file format is IDX: a big-endian header, then raw bytes.
"""

import gzip
import io
import logging
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.sources.base import Record, files_digest
from ldm.data.sources.huggingface import HuggingFace
from ldm.errors import UserError

DEBIAN_PATH = "/usr/share/datasets/fashion-mnist"
HUB_ID = "zalando-datasets/fashion_mnist"
NUM_IMAGES = 70_000
PARTS = ("train", "t10k")
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
REMEDY = "Install it with `apt-get install dataset-fashion-mnist`, or set its folder with data.path=DIR."


class FashionMNIST:
    """All 70,000 training and test images. Our split by content hash replaces the published split.

    The IDX files in `path` can be gzipped. If the Debian package is not installed, the images are read from the Hugging
    Face Hub instead. Images are hashed by their pixels, so both origins result in the same split.

    Raises:
        UserError: the folder is missing or damaged, or the hub cannot be reached.
    """

    name = "fashion_mnist"
    licence = "Fashion-MNIST (MIT, Zalando SE)"

    def __init__(self, path: str | Path = DEBIAN_PATH):
        self.path = Path(path).expanduser()
        self.class_names = list(CLASS_NAMES)
        self._hub: HuggingFace | None = None
        if self.path.is_dir():
            self._files = [
                _find(self.path, f"{part}-{kind}") for part in PARTS for kind in ("images-idx3", "labels-idx1")
            ]
        elif str(path) == DEBIAN_PATH:
            self._hub = HuggingFace(HUB_ID, split="train+test", caption_column=None)
        else:
            raise UserError(f"data.path={path} is not a folder. {REMEDY}")

    @property
    def num_records(self) -> int:
        return NUM_IMAGES if self._hub else sum(len(_read_idx(path, 1)) for path in self._files[1::2])

    def identity(self) -> dict[str, Any]:
        if self._hub:
            return self._hub.identity()
        return {"path": self.path.resolve().as_posix(), "files": files_digest(self.path, self._files)}

    def records(self) -> Iterator[Record]:
        return self._from_hub(self._hub) if self._hub else self._from_files()

    def _from_files(self) -> Iterator[Record]:
        for part, images_path, labels_path in zip(PARTS, self._files[::2], self._files[1::2], strict=True):
            images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
            if len(images) != len(labels):
                counts = f"{images_path} contains {len(images)} images, but {labels_path} has {len(labels)} labels"
                raise UserError(f"{counts}. {REMEDY}")
            for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
                image = Image.fromarray(pixels)
                yield Record(f"{part}[{number}]", image.copy, None, int(label), pixels.tobytes())

    def _from_hub(self, hub: HuggingFace) -> Iterator[Record]:
        message = "%s does not exist. Reading %s from the Hugging Face Hub instead."
        logging.getLogger(__name__).warning(message, self.path, HUB_ID)
        try:
            for record in hub.records():
                encoded = record.load()
                assert isinstance(encoded, bytes)
                image = Image.open(io.BytesIO(encoded)).convert("L")
                yield Record(record.name, image.copy, None, record.label, image.tobytes())
        except UserError as error:
            raise UserError(f"{error} Fashion-MNIST is also available as a Debian package. {REMEDY}") from error


def _find(folder: Path, stem: str) -> Path:
    for path in (folder / f"{stem}-ubyte", folder / f"{stem}-ubyte.gz"):
        if path.is_file():
            return path
    raise UserError(f"{folder} has no {stem}-ubyte or {stem}-ubyte.gz. {REMEDY}")


def _read_idx(path: Path, num_axes: int) -> np.ndarray:
    """Read an IDX file: two zero bytes, the element type (8 is uint8), the number of axes, their sizes, the data."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if content[:4] != bytes([0, 0, 8, num_axes]):
            raise ValueError(f"not an IDX file of uint8 values with {num_axes} axes")
        shape = struct.unpack_from(f">{num_axes}I", content, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * num_axes).reshape(shape)
    except (EOFError, zlib.error, gzip.BadGzipFile, struct.error, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}. {REMEDY}") from error
