"""The same images of several runs in one picture: samples from the same noise, or reconstructions of the same."""

from typing import Annotated

import torch
from PIL import Image
from pydantic import Field

from ldm.data.images import ImageData
from ldm.diffusion.samplers.base import SamplerLike
from ldm.errors import UserError
from ldm.evaluation.comparison.compare import Comparison
from ldm.evaluation.image_sets import held_out_apart
from ldm.image_grid import rows, to_pil
from ldm.rules import Count, Number, Seed, Whole, checked
from ldm.sampling.draw import draw
from ldm.sampling.pipeline import LatentDiffusionPipeline
from ldm.sampling.request import Request, read_prompts


@checked
def side_by_side(
    comparison: Comparison,
    sampler: SamplerLike,
    *,
    device: torch.device,
    num_samples: Annotated[Whole, Field(ge=0)] = 8,
    prompts: str | None = None,
    guidance: Number = 3.0,
    seed: Seed = 0,
    batch_size: Count = 64,
) -> tuple[Image.Image | None, list[str]]:
    """One row per run, what belongs together in one column; for stage=vae the originals on top.

    Column i is drawn from noise of seed and i alone: the same in all runs whose latents are of one shape.

    Args:
        num_samples: Columns; 0 draws nothing.
        prompts: A file with a caption per line; None takes the captions or classes of validation images.

    Returns:
        The picture, None where no run could draw, and lines that say which rows are missing and why.
    """
    if not num_samples:
        return None, []
    images, notes = _first_images(comparison)
    shown: list[tuple[str, list[Image.Image]]] = []
    captions: list[str | None] | None = None
    for group, run in comparison.runs:
        try:
            if run.run is None:
                raise UserError("W&B holds no weights of it.")
            if run.stage == "vae":
                if images is None or run.run.facts["data_fingerprint"] != images.fingerprint:
                    raise UserError("It was trained on other images than those shown, or there are none at hand.")
                originals = images.batch(held_out_apart(images, num_samples))
                autoencoder = run.run.autoencoder().to(device)
                drawn = autoencoder.decode(autoencoder.encode(originals)[0])
                shown += [] if shown else [("originals", to_pil(originals))]
            else:
                pipeline = run.run.pipeline().to(device)
                request = _request(pipeline, images, prompts, num_samples, captions)
                batches = draw(pipeline, request, sampler, guidance=guidance, seed=seed, batch_size=batch_size)
                drawn = torch.cat(list(batches))
                captions = captions or (request.captions if any(request.captions) else None)
            shown.append((f"{group.label} {run.name}", to_pil(drawn)))
        except UserError as error:
            notes.append(f"Not in the picture: {run.place}. {error}")
    return rows(shown, captions=captions) if shown else None, notes


def _first_images(comparison: Comparison) -> tuple[ImageData | None, list[str]]:
    """The prepared images of the first run whose are at hand, or why there are none."""
    reasons = []
    for _, run in comparison.runs:
        try:
            if run.run is not None:
                return run.run.image_data(), []
        except UserError as error:
            reasons.append(f"No held-out images at hand. {error}")
    return None, reasons[:1]


def _request(
    pipeline: LatentDiffusionPipeline,
    images: ImageData | None,
    prompts: str | None,
    num_samples: int,
    above: list[str | None] | None,
) -> Request:
    """What the columns show; `above`, what those of the rows before are, of which classes are the same by name."""
    if prompts:
        return Request(*pipeline.conditioning.of_request(read_prompts(prompts)[:num_samples]))
    if images is not None:
        return Request.of_images(pipeline, images, held_out_apart(images, num_samples))
    known = pipeline.conditioning.class_names is not None
    names = [name for name in above or () if known and name is not None]
    return Request(*pipeline.conditioning.of_request(classes=names or None, num_samples=num_samples))
