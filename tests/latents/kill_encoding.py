"""Encode latents in processes that are killed with SIGKILL, then once more to the end; what test_killed_cache.py runs.

    python tests/latents/kill_encoding.py FOLDER KILLS

Every point between two file operations of an encoding is tried once, and KILLS moments at random, the same cache being
killed up to three times. Prints a JSON object: how many of each fell, and how many ended in the same bytes.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from ldm.data.images import ImageData, prepare
from ldm.data.sources.image_folder import ImageFolder
from ldm.latents import encoding as latent_encoding
from ldm.latents.cache import open_latents
from ldm.latents.contract import LatentContract
from tests.conftest import draw_images

BATCH_SIZE, CHUNK_IMAGES = 4, 8


def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds differently in batches of another size, as convolutions do."""
    mean = F.avg_pool2d(pixels, 4) * (1 + 1e-6 * len(pixels))
    return mean, 0.3 * mean.flip(1) - 1


def cached(images: ImageData, folder: Path, before_batch: Callable[[], None] = lambda: None) -> None:
    def slowly(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before_batch()
        return encode(pixels)

    contract = LatentContract("a" * 64, images.fingerprint, 8, 4, 3, images.val_fraction, flip=True)
    open_latents(slowly, contract, images, cache_dir=folder, batch_size=BATCH_SIZE)


def in_child(work: Callable[[], None]) -> int:
    """The process's number. It does not come back; its end is 0 where the work was done."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def ended(child: int) -> int:
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def killed_at(images: ImageData, folder: Path, point: int) -> None:
    """Count file operations and batches of this process, which dies before the one of this number."""
    seen = 0

    def step(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen > point:
            os.kill(os.getpid(), signal.SIGKILL)

    def audited(event: str, arguments: tuple) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "os.rmdir") and str(folder) in str(
            arguments[0]
        ):
            step()

    for name in ("fsync", "replace"):
        original = getattr(os, name)
        setattr(os, name, lambda *given, original=original: (step(), original(*given))[1])
    append = latent_encoding._append
    latent_encoding._append = lambda *given: (step(), append(*given))[1]
    sys.addaudithook(audited)
    cached(images, folder, step)


def bytes_of(folder: Path) -> dict[str, str]:
    """Every file but the locks, and its SHA-256."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main(place: Path, kills: int) -> None:
    torch.set_num_threads(1)
    latent_encoding.CHUNK_IMAGES, latent_encoding.JOURNAL_S = CHUNK_IMAGES, 0.0
    source = ImageFolder(draw_images(place / "squares", 14, size=8))
    images = prepare(source, resolution=8, cache_dir=place / "images", val_fraction=0.2, progress=False)
    assert ended(in_child(lambda: cached(images, place / "whole"))) == 0
    expected = bytes_of(place / "whole")
    found = {
        "points": 0,
        "points_equal": 0,
        "random": 0,
        "caches": 0,
        "caches_equal": 0,
        "finished_before": 0,
        "seconds": 0.0,
    }
    started = time.perf_counter()

    for point in range(10_000):
        folder = place / f"point-{point}"
        end = ended(in_child(lambda point=point, folder=folder: killed_at(images, folder, point)))
        if end == 0:
            break
        assert end == -signal.SIGKILL, end
        assert ended(in_child(lambda folder=folder: cached(images, folder))) == 0
        found["points"] += 1
        found["points_equal"] += bytes_of(folder) == expected

    generator = random.Random(0)
    for number in range(kills):
        folder = place / f"random-{number}"
        for _ in range(generator.randint(1, 3)):
            child = in_child(lambda folder=folder: cached(images, folder, lambda: time.sleep(0.002)))
            time.sleep(generator.uniform(0, 0.06))
            os.kill(child, signal.SIGKILL)
            found["random"] += 1
            found["finished_before"] += ended(child) == 0
        assert ended(in_child(lambda folder=folder: cached(images, folder))) == 0
        found["caches"] += 1
        found["caches_equal"] += bytes_of(folder) == expected
    found["seconds"] = round(time.perf_counter() - started, 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
