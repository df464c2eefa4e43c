"""Encode latents in processes that are killed with SIGKILL, then once more to the end; what test_killed_cache.py runs.

    python tests/latents/kill_encoding.py FOLDER

Every point between two file operations of an encoding is tried once. Prints how many there are, and how many ended in
the same bytes.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ldm.data.images import ImageData, prepare
from ldm.data.sources.image_folder import ImageFolder
from ldm.files.digest import sha256_of_file
from ldm.latents import encoding as latent_encoding
from ldm.latents.cache import open_latents
from ldm.latents.contract import LatentContract
from tests.conftest import draw_images

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "os.rmdir")


def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds differently in batches of another size, as convolutions do."""
    mean = torch.nn.functional.avg_pool2d(pixels, 4) * (1 + 1e-6 * len(pixels))
    return mean, 0.3 * mean.flip(1) - 1


def cached(images: ImageData, folder: Path) -> None:
    contract = LatentContract("a" * 64, images.fingerprint, 8, 4, 3, images.val_fraction, flip=True)
    open_latents(encode, contract, images, cache_dir=folder, batch_size=4)


def exit_code(work: Callable[..., None], *arguments: object) -> int:
    """Of a process that does this work: 0 where it was done, below 0 where it was killed."""
    child = os.fork()
    if not child:
        try:
            work(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(images: ImageData, folder: Path, point: int) -> None:
    """Count file operations of this process, which dies before the one of this number."""
    seen = 0

    def step(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen > point:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(module: object, name: str) -> None:
        original = getattr(module, name)
        setattr(module, name, lambda *given: (step(), original(*given))[1])

    for module, name in ((os, "fsync"), (os, "replace"), (latent_encoding, "_append")):
        before(module, name)
    sys.addaudithook(lambda event, given: step() if event in OPERATIONS and str(folder) in str(given[0]) else None)
    cached(images, folder)


def bytes_of(folder: Path) -> dict[str, str]:
    """Every file but the locks, and its SHA-256."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): sha256_of_file(path) for path in files}


def main(place: Path) -> None:
    torch.set_num_threads(1)
    latent_encoding.CHUNK_IMAGES = 8
    source = ImageFolder(draw_images(place / "squares", 14, size=8))
    images = prepare(source, resolution=8, cache_dir=place / "images", val_fraction=0.2, progress=False)
    assert exit_code(cached, images, place / "whole") == 0
    expected, points, equal = bytes_of(place / "whole"), 0, 0
    while (end := exit_code(killed_at, images, place / f"point-{points}", points)) != 0:
        assert end == -signal.SIGKILL, end
        assert exit_code(cached, images, place / f"point-{points}") == 0
        equal += bytes_of(place / f"point-{points}") == expected
        points += 1
    print(points, equal)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
