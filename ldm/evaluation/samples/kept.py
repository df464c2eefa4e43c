"""Samples of a run on disk, as they are drawn: what was interrupted goes on, and a larger number begins with a smaller.

Two files per way of drawing, named by what decides a sample: samples-<key>.bin, uint8 [n, H, W, 3] without a header,
so that its length says how many there are, and samples-<key>.json with what made them and what they cost. While one
process draws, samples-<key>.lock keeps others from it.
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
from ldm.files.lock import alone
from ldm.files.untrusted import check_fields, read_json
from ldm.rules import Count, Seed, checked
from ldm.runtime.random import numpy_generator
from ldm.sampling.draw import Guidance, Interval, describe, draw
from ldm.sampling.pipeline import LatentDiffusionPipeline
from ldm.sampling.request import Request

FORMAT = 2
"""Of the files, and of how noise and captions are chosen: samples of another are drawn again."""
NOT_FINITE = (
    "the network diverged in training, or the sampler is not stable. Train it again with a lower optimizer.lr, or "
    "choose another sampler or more sampler.steps."
)


@dataclass(frozen=True)
class KeptSamples:
    """Samples [n, H, W, 3] in uint8, memory-mapped, and what one of them costs."""

    images: np.ndarray
    evaluations: float
    """Calls of the network per sample; both branches of guidance count."""
    seconds: float
    """Per sample, decoding included, on whatever machine drew it."""

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Any) -> Tensor:
        """Float32 [b, 3, H, W] in [-1, 1], as `ImageData.batch`."""
        pixels = torch.from_numpy(self.images[np.asarray(indices, dtype=np.int64)])
        return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def chosen_rows(members: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Rows of a split whose captions or classes the samples are of; more samples than images begin again."""
    order = numpy_generator(seed, 1).permutation(len(members))
    return np.resize(order, num_samples)


@checked
def draw_and_keep(
    pipeline: LatentDiffusionPipeline,
    images: ImageData,
    sampler: SamplerLike,
    folder: Path,
    *,
    num_samples: Count,
    guidance: Guidance,
    guidance_interval: Interval = (0.0, 1.0),
    seed: Seed,
    batch_size: Count = 64,
    split: str = "train",
) -> KeptSamples:
    """Samples for captions or classes of training images, or of held-out ones, drawn from where an earlier call ended.

    Sample i depends on the seed and i alone, up to the rounding of batches of another size.

    Args:
        split: train or val.

    Raises:
        UserError: what `draw` refuses, samples that are not finite, facts beside kept samples that cannot be read,
            another process that draws the same.
    """
    options: Any = {"guidance": guidance, "guidance_interval": guidance_interval, "seed": seed}
    made_by = {
        "format": FORMAT,
        **_model(pipeline),
        "data_fingerprint": images.fingerprint,
        "val_fraction": images.val_fraction,
        "sampler": describe(sampler),
        **options,
        "split": split,
    }
    key = sha256_of_values(made_by)[:12]
    folder.mkdir(parents=True, exist_ok=True)
    pixels, facts = (folder / f"samples-{key}{end}" for end in (".bin", ".json"))
    side = images.resolution
    size = 3 * side**2
    drawn, cost = _drawn_before(pixels, facts, size)
    if drawn < num_samples:
        members = images.train_indices if split == "train" else images.val_indices
        request = Request.of_images(pipeline, images, members[chosen_rows(members, num_samples, seed)])
        calls: list[int] = []
        hook = pipeline.network.register_forward_pre_hook(lambda _, arguments: calls.append(len(arguments[0])))
        try:
            with alone(pixels.with_suffix(".lock")), pixels.open("ab") as file:
                drawn, cost = _drawn_before(pixels, facts, size)  # another process may have drawn some since
                file.truncate(drawn * size)  # an image that was half written
                began = time.perf_counter()
                for part in draw(pipeline, request, sampler, batch_size=batch_size, first=drawn, **options):
                    if wrong := int((~part.isfinite().flatten(1).all(1)).sum()):
                        raise UserError(f"{wrong} of {len(part)} samples are not finite: {NOT_FINITE}")
                    file.write(to_uint8(part).permute(0, 2, 3, 1).contiguous().numpy().tobytes())
                    file.flush()
                    cost["samples"] += len(part)
                    cost["network_evaluations"] += sum(calls)
                    cost["seconds"] += time.perf_counter() - began
                    content = {"made_by": made_by, "shape": [side, side, 3], "cost": cost}
                    write_text(facts, json.dumps(content, indent=2) + "\n")
                    calls.clear()
                    began = time.perf_counter()
        except Timeout as error:
            raise UserError(
                f"Another process draws these samples, {pixels}. Wait for its end: then they are taken from there. Or "
                "choose another seed= or sampler.steps=."
            ) from error
        finally:
            hook.remove()
    kept = np.memmap(pixels, np.uint8, "r", shape=(num_samples, side, side, 3))
    return KeptSamples(kept, *(cost[name] / max(1, cost["samples"]) for name in ("network_evaluations", "seconds")))


def _drawn_before(pixels: Path, facts: Path, size: int) -> tuple[int, dict[str, Any]]:
    """How many samples of so many bytes there are, and what they cost."""
    drawn = pixels.stat().st_size // size if pixels.is_file() and facts.is_file() else 0
    if not drawn:
        return 0, {"samples": 0, "network_evaluations": 0, "seconds": 0.0}
    content = read_json(facts)
    check_fields(content, {"cost": dict}, facts)
    check_fields(content["cost"], {"samples": int, "network_evaluations": float, "seconds": float}, facts)
    return drawn, content["cost"]


def _model(pipeline: LatentDiffusionPipeline) -> dict[str, Any]:
    """All of a model that decides a sample."""
    fitted = pipeline.z_0_mse
    return {
        "network_sha256": weights_sha256(pipeline.network),
        "autoencoder_sha256": pipeline.contract.autoencoder_sha256,
        "statistics": repr(pipeline.autoencoder.statistics),
        "chain_sha256": pipeline.chain_sha256,
        "prediction": pipeline.prediction,
        "variance": pipeline.variance,
        "z_0_mse_sha256": None if fitted is None else hashlib.sha256(fitted.numpy().tobytes()).hexdigest(),
        "conditioning_sha256": hashlib.sha256(json.dumps(pipeline.conditioning.state()).encode()).hexdigest(),
    }
