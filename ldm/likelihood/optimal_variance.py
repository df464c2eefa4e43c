"""Fit of the optimal Sigma at each t for a trained model."""

from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from ldm.data.images import ImageData
from ldm.diffusion.bound import fit_z_0_mse
from ldm.errors import UserError
from ldm.likelihood.two_stage import draw_latents
from ldm.progress import ProgressBars
from ldm.runtime.random import numpy_generator, torch_generator
from ldm.sampling.pipeline import LatentDiffusion, save_z_0_mse
from ldm.sampling.request import Request

NUM_FIT_IMAGES = 1024
"""Maximum number of training images used for the fit."""


def fit_optimal_variance(
    pipeline: LatentDiffusion,
    images: ImageData,
    folder: Path,
    *,
    seed: int,
    batch_size: int,
    bar: Progress,
    images_per_step: int = 16,
) -> None:
    """Fit the optimal Sigma at each t on the training split, and save the result in the pipeline's folder.

    Raises:
        UserError: if the autoencoder or the network returns non-finite values.
    """
    indices = numpy_generator(seed, 3).permutation(images.train_indices)[:NUM_FIT_IMAGES]
    generator = torch_generator(seed, 3)
    latents: list[Tensor] = []
    for start in range(0, len(indices), batch_size):
        batch = images.batch(indices[start : start + batch_size])
        latents.append(draw_latents(pipeline.autoencoder, batch, [generator] * len(batch))[2])
    z_0 = pipeline.autoencoder.standardise(torch.cat(latents))
    report_progress = ProgressBars(bar)
    pipeline.network.eval()
    request = Request.for_images(pipeline, images, indices)
    condition = {name: value.to(pipeline.device) for name, value in request.condition.items()}
    try:
        pipeline.z_0_mse = fit_z_0_mse(
            pipeline.denoiser(),
            z_0.to(pipeline.device),
            condition,
            generator=generator,
            images_per_step=images_per_step,
            batch_size=batch_size,
            on_batch=lambda completed, total: report_progress("fitting Sigma", completed, total),
        )
    except ValueError as error:
        raise UserError(f"variance=optimal cannot be fitted: {error}. Choose a different variance.") from error
    settings = {"images": len(indices), "images_per_step": images_per_step, "seed": seed, "data": images.fingerprint}
    save_z_0_mse(folder, pipeline.z_0_mse, settings)
