"""A disk cache of samples, so that interrupted sampling can be resumed and larger requests can reuse samples.

Each combination of settings has two files. The <key> in the file names is a digest of everything that determines a
sample.
samples-<key>.bin contains uint8 [n, H, W, 3] without a header, so the number of samples follows from the file size.
samples-<key>.json contains the settings and the cost. The sampling process holds the lock samples-<key>.lock.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import Timeout
from torch import Tensor

from ldm.autoencoder.autoencoder import weights_sha256
from ldm.data.images import ImageData, to_uint8
from ldm.diffusion.samplers.base import SamplerLike
from ldm.errors import UserError
from ldm.files.atomic import write_text
from ldm.files.digest import sha256_of_values
from ldm.files.lock import file_lock
from ldm.files.untrusted import check_fields, read_json
from ldm.rules import Count, Seed, checked
from ldm.runtime.random import numpy_generator
from ldm.sampling.draw import Guidance, GuidanceInterval, draw_batches, sampler_settings
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.request import Request

FORMAT = 2
"""Version of the file format and of how noise and captions are chosen. Samples from other versions are not reused."""
NOT_FINITE_REASON = (
    "the network diverged in training, or the sampler is unstable. Train the network again with a lower optimizer.lr, "
    "or choose a different sampler= or more sampler.steps."
)


@dataclass(frozen=True)
class CachedSamples:
    """Memory-mapped samples [n, H, W, 3] in uint8, and the cost per sample."""

    images: np.ndarray
    evaluations: float
    """Network evaluations per sample. With guidance, both branches count."""
    seconds: float
    """Time per sample, including decoding, on the machine that generated it."""

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Any) -> Tensor:
        """Return float32 images [b, 3, H, W] in [-1, 1], like `ImageData.batch`."""
        pixels = torch.from_numpy(self.images[np.asarray(indices, dtype=np.int64)])
        return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def condition_rows(members: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Return the rows of a split whose captions or classes condition the samples.

    Rows repeat if the split has fewer images than `num_samples`.
    """
    order = numpy_generator(seed, 1).permutation(len(members))
    return np.resize(order, num_samples)


@checked
def draw_cached(
    pipeline: LatentDiffusion,
    images: ImageData,
    sampler: SamplerLike,
    folder: Path,
    *,
    num_samples: Count,
    guidance: Guidance,
    guidance_interval: GuidanceInterval = (0.0, 1.0),
    seed: Seed,
    batch_size: Count = 64,
    split: str = "train",
) -> CachedSamples:
    """Return samples for captions or classes of a split, drawing only samples that are not cached.

    Sample i depends only on the seed and i, up to rounding differences between batch sizes.

    Args:
        split: "train" or "val", the split that provides the captions or classes.

    Raises:
        UserError: As raised by `draw_batches`, or if samples are not finite, the JSON file of cached samples cannot be
            read, or another process is drawing the same samples.
    """
    options: Any = {"guidance": guidance, "guidance_interval": guidance_interval, "seed": seed}
    settings = {
        "format": FORMAT,
        **_pipeline_facts(pipeline),
        "data_fingerprint": images.fingerprint,
        "val_fraction": images.val_fraction,
        "sampler": sampler_settings(sampler),
        **options,
        "split": split,
    }
    key = sha256_of_values(settings)[:12]
    folder.mkdir(parents=True, exist_ok=True)
    pixels, facts = (folder / f"samples-{key}{suffix}" for suffix in (".bin", ".json"))
    side = images.resolution
    size = 3 * side**2
    count, cost = _read_cached(pixels, facts, size)
    if count < num_samples:
        members = images.train_indices if split == "train" else images.val_indices
        request = Request.for_images(pipeline, images, members[condition_rows(members, num_samples, seed)])
        call_sizes: list[int] = []
        hook = pipeline.network.register_forward_pre_hook(lambda _, arguments: call_sizes.append(len(arguments[0])))
        try:
            with file_lock(pixels.with_suffix(".lock")), pixels.open("ab") as file:
                count, cost = _read_cached(pixels, facts, size)  # another process may have added samples
                file.truncate(count * size)  # remove a partially written image
                started = time.perf_counter()
                for batch in draw_batches(pipeline, request, sampler, batch_size=batch_size, first=count, **options):
                    if num_invalid := int((~batch.isfinite().flatten(1).all(1)).sum()):
                        raise UserError(f"{num_invalid} of {len(batch)} samples are not finite: {NOT_FINITE_REASON}")
                    file.write(to_uint8(batch).permute(0, 2, 3, 1).contiguous().numpy().tobytes())
                    file.flush()
                    cost["samples"] += len(batch)
                    cost["network_evaluations"] += sum(call_sizes)
                    cost["seconds"] += time.perf_counter() - started
                    content = {"made_by": settings, "shape": [side, side, 3], "cost": cost}
                    write_text(facts, json.dumps(content, indent=2) + "\n")
                    call_sizes.clear()
                    started = time.perf_counter()
        except Timeout as error:
            raise UserError(
                f"Another process is drawing the samples in {pixels}. Wait until it has finished to reuse its "
                "samples, or choose a different seed= or sampler.steps=."
            ) from error
        finally:
            hook.remove()
    cached = np.memmap(pixels, np.uint8, "r", shape=(num_samples, side, side, 3))
    return CachedSamples(cached, *(cost[name] / max(1, cost["samples"]) for name in ("network_evaluations", "seconds")))


def _read_cached(pixels: Path, facts: Path, size: int) -> tuple[int, dict[str, Any]]:
    """Return the number of cached samples of `size` bytes each, and their cost."""
    count = pixels.stat().st_size // size if pixels.is_file() and facts.is_file() else 0
    if not count:
        return 0, {"samples": 0, "network_evaluations": 0, "seconds": 0.0}
    content = read_json(facts)
    check_fields(content, {"cost": dict}, facts)
    check_fields(content["cost"], {"samples": int, "network_evaluations": float, "seconds": float}, facts)
    return count, content["cost"]


def _pipeline_facts(pipeline: LatentDiffusion) -> dict[str, Any]:
    """Return the properties of a pipeline that determine its samples."""
    z_0_mse, decoder_sha256 = pipeline.z_0_mse, pipeline.autoencoder.sampling_decoder_sha256()
    return {
        "network_sha256": weights_sha256(pipeline.network),
        "autoencoder_sha256": pipeline.contract.autoencoder_sha256,
        **({} if decoder_sha256 is None else {"sampling_decoder_sha256": decoder_sha256}),
        "statistics": repr(pipeline.autoencoder.statistics),
        "chain_sha256": pipeline.chain_sha256,
        "prediction": pipeline.prediction,
        "variance": pipeline.variance,
        "z_0_mse_sha256": None if z_0_mse is None else hashlib.sha256(z_0_mse.numpy().tobytes()).hexdigest(),
        "conditioning_sha256": hashlib.sha256(json.dumps(pipeline.conditioning.state()).encode()).hexdigest(),
    }
