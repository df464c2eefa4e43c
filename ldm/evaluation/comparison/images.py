"""One figure with images of several runs: samples from the same noise, or reconstructions of the same images."""

from typing import Annotated

import torch
from PIL import Image
from pydantic import Field

from ldm.data.images import ImageData
from ldm.diffusion.samplers.base import SamplerLike
from ldm.errors import UserError
from ldm.evaluation.comparison.compare import Comparison
from ldm.evaluation.image_sets import spaced_val_indices
from ldm.image_grid import labelled_rows, to_pil
from ldm.rules import Count, Integer, Number, Seed, checked
from ldm.sampling.draw import draw_batches
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.request import Request, read_prompts


@checked
def side_by_side(
    comparison: Comparison,
    sampler: SamplerLike,
    *,
    device: torch.device,
    num_samples: Annotated[Integer, Field(ge=0)] = 8,
    prompts: str | None = None,
    guidance: Number = 3.0,
    seed: Seed = 0,
    batch_size: Count = 64,
) -> tuple[Image.Image | None, list[str]]:
    """Plot one row of images per run, preceded by a row of originals if the runs are autoencoder runs.

    The noise of column i depends only on the seed and i, so all runs with the same latent shape share the noise.

    Args:
        num_samples: Number of columns; 0 skips the figure.
        prompts: A file with one caption per line; None uses the captions or classes of validation images.

    Returns:
        The figure, or None if it has no rows, and notes on which rows are missing and why.
    """
    if not num_samples:
        return None, []
    images, notes = _first_images(comparison)
    rows: list[tuple[str, list[Image.Image]]] = []
    captions: list[str | None] | None = None
    for group, run in comparison.runs:
        try:
            if run.run is None:
                raise UserError("W&B does not store the weights of this run. Use the run folder instead.")
            if run.stage == "vae":
                if images is None or run.run.facts["data_fingerprint"] != images.fingerprint:
                    raise UserError("The run was not trained on the images shown, or no images are available.")
                originals = images.batch(spaced_val_indices(images, num_samples))
                autoencoder = run.run.autoencoder().to(device)
                row_images = autoencoder.decode(autoencoder.encode(originals)[0])
                rows += [] if rows else [("originals", to_pil(originals))]
            else:
                pipeline = run.run.pipeline().to(device)
                request = _request(pipeline, images, prompts, num_samples, captions)
                batches = draw_batches(pipeline, request, sampler, guidance=guidance, seed=seed, batch_size=batch_size)
                row_images = torch.cat(list(batches))
                captions = captions or (request.captions if any(request.captions) else None)
            rows.append((f"{group.label} {run.name}", to_pil(row_images)))
        except UserError as error:
            notes.append(f"Not in the figure: {run.source}. {error}")
    return labelled_rows(rows, captions=captions) if rows else None, notes


def _first_images(comparison: Comparison) -> tuple[ImageData | None, list[str]]:
    """Return the prepared images of the first run for which they exist, or None and a note that explains the reason."""
    reasons = []
    for _, run in comparison.runs:
        try:
            if run.run is not None:
                return run.run.image_data(), []
        except UserError as error:
            reasons.append(f"No held-out images are available. {error}")
    return None, reasons[:1]


def _request(
    pipeline: LatentDiffusion,
    images: ImageData | None,
    prompts: str | None,
    num_samples: int,
    captions: list[str | None] | None,
) -> Request:
    """Return the sampling request for one row.

    Args:
        captions: Captions of the rows above. Without prompts and images, these captions name the classes to sample.
    """
    if prompts:
        return Request(*pipeline.conditioning.for_request(read_prompts(prompts)[:num_samples]))
    if images is not None:
        return Request.for_images(pipeline, images, spaced_val_indices(images, num_samples))
    has_names = pipeline.conditioning.class_names is not None
    names = [name for name in captions or () if has_names and name is not None]
    return Request(*pipeline.conditioning.for_request(classes=names or None, num_samples=num_samples))
