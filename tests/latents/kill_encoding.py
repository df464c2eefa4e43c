"""Kill latent encoding with SIGKILL before every file operation, then resume it. Run by test_killed_cache.py.

    python tests/latents/kill_encoding.py FOLDER

For each file operation, one process encodes until it is killed just before the operation, and a second process resumes
encoding. Prints the number of kill points, and the number of resumed caches that are bitwise identical to a cache from
an uninterrupted run.
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
    """Encode with results that depend slightly on the batch size, like the rounding errors of convolutions."""
    mean = torch.nn.functional.avg_pool2d(pixels, 4) * (1 + 1e-6 * len(pixels))
    return mean, 0.3 * mean.flip(1) - 1


def encode_cache(images: ImageData, folder: Path) -> None:
    contract = LatentContract("a" * 64, images.fingerprint, 8, 4, 3, images.val_fraction, flip=True)
    open_latents(encode, contract, images, cache_dir=folder, batch_size=4)


def exit_code(function: Callable[..., None], *arguments: object) -> int:
    """Run `function` in a forked process. Return its exit code: 0 on success, negative if a signal killed it."""
    child = os.fork()
    if not child:
        try:
            function(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def encode_until_killed(images: ImageData, folder: Path, point: int) -> None:
    """Encode the latents, and kill this process before its file operation with index `point`."""
    operations = 0

    def count_operation(*_: object) -> None:
        nonlocal operations
        operations += 1
        if operations > point:
            os.kill(os.getpid(), signal.SIGKILL)

    def count_calls(module: object, name: str) -> None:
        original = getattr(module, name)
        setattr(module, name, lambda *arguments: (count_operation(), original(*arguments))[1])

    for module, name in ((os, "fsync"), (os, "replace"), (latent_encoding, "_append")):
        count_calls(module, name)
    sys.addaudithook(
        lambda event, args: count_operation() if event in OPERATIONS and str(folder) in str(args[0]) else None
    )
    encode_cache(images, folder)


def file_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file except lock files."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): sha256_of_file(path) for path in files}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    latent_encoding.IMAGES_PER_CHUNK = 8
    source = ImageFolder(draw_images(folder / "squares", 14, size=8))
    images = prepare(source, resolution=8, cache_dir=folder / "images", val_fraction=0.2, progress=False)
    assert exit_code(encode_cache, images, folder / "uninterrupted") == 0
    expected, num_points, num_identical = file_digests(folder / "uninterrupted"), 0, 0
    while (code := exit_code(encode_until_killed, images, folder / f"point-{num_points}", num_points)) != 0:
        assert code == -signal.SIGKILL, code
        assert exit_code(encode_cache, images, folder / f"point-{num_points}") == 0
        num_identical += file_digests(folder / f"point-{num_points}") == expected
        num_points += 1
    print(num_points, num_identical)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
