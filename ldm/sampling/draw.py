"""Generate images in batches, write them to a folder, and render the reverse chain as a film strip."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import BeforeValidator, Field
from torch import Tensor

from ldm.diffusion.samplers.base import OnStep, SamplerLike
from ldm.diffusion.samplers.multistep import DPMSolver
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.image_grid import grid, labelled_rows, to_pil
from ldm.progress import progress
from ldm.rules import Count, Number, Seed, checked
from ldm.runtime.random import sample_generators
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.request import Request

MAX_STRIP_SAMPLES = 4
MAX_STRIP_COLUMNS = 11


def _read_interval(interval: Any) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in interval)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise ValueError(
            "must be the lowest and highest u = t / T at which guidance applies, such as guidance_interval=[0.2,0.8]"
        )
    return low, high


Guidance = Annotated[Number, Field(ge=-1e6, le=1e6)]
"""Scale of classifier-free guidance; 1 disables it."""
GuidanceInterval = Annotated[tuple[float, float], BeforeValidator(_read_interval)]
"""Lowest and highest u = t / T at which guidance applies."""


def check_sampler(sampler: SamplerLike, schedule: NoiseSchedule) -> None:
    """Check that a sampler is compatible with the noise schedule.

    Raises:
        UserError: If the sampler is not compatible, for example because it has more steps than the chain.
    """
    try:
        sampler.check(schedule)
    except ValueError as error:
        raise UserError(f"sampler={sampler.method} with {sampler.steps} steps: {error}.") from error


@checked
def draw_batches(
    pipeline: LatentDiffusion,
    request: Request,
    sampler: SamplerLike,
    *,
    guidance: Guidance,
    guidance_interval: GuidanceInterval = (0.0, 1.0),
    seed: Seed,
    batch_size: Count = 64,
    first: int = 0,
    on_step: OnStep | None = None,
) -> Iterator[Tensor]:
    """Generate images [b, 3, H, W] in [-1, 1] batch by batch, with a progress bar.

    Args:
        first: Index of the first sample to generate. Sample i depends only on the seed and i, so an interrupted call
            can be continued from any sample.
        on_step: Called after each sampler step.

    Raises:
        UserError: If the sampler is not compatible with the model, or if a solver does not converge.
    """
    check_sampler(sampler, pipeline.schedule)
    pipeline.check_variance(sampler.variance)
    total = len(request)
    with progress() as bar:
        task = bar.add_task("sampling", total=total, completed=first)
        completed = first

        def step(s: float, z_s: Tensor, z_0: Tensor) -> None:
            # progress is measured in t: an adaptive solver does not know its number of steps in advance
            fraction = 1 - s / pipeline.schedule.num_steps
            bar.update(task, completed=completed + fraction * min(batch_size, total - completed))
            if on_step is not None:
                on_step(s, z_s, z_0)

        for start in range(first, total, batch_size):
            stop = min(start + batch_size, total)
            condition = {name: value[start:stop] for name, value in request.condition.items()}
            generators = sample_generators(seed, range(start, stop))
            try:
                options: Any = {"guidance": guidance, "guidance_interval": guidance_interval, "on_step": step}
                z = pipeline.sample(sampler, condition, generators, **options)
            except ArithmeticError as error:
                raise UserError(
                    f"sampler={sampler.method} failed: {error}. Try a larger tolerance, such as sampler.rtol=0.001."
                ) from error
            completed = stop
            yield pipeline.decode(z).cpu()


def draw_images(
    pipeline: LatentDiffusion,
    *,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int | str] | None = None,
    num_samples: int = 16,
    sampler: SamplerLike | None = None,
    guidance: float = 3.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[Image.Image]:
    """Generate images for prompts, or for classes by number or name. Image i depends only on the seed and i.

    >>> from ldm import DDIM, Run, draw_images
    >>> pipeline = Run.open("runs/diffusion/demo").pipeline()
    >>> images = draw_images(pipeline, labels=["cat", 1], sampler=DDIM(steps=5), seed=3)
    >>> images[0].size
    (8, 8)

    Args:
        num_samples: Number of images if neither prompts nor labels are given. A class-conditional model then cycles
            through its classes; a text-conditional one uses the empty prompt.
        sampler: Defaults to DPM-Solver++ with 20 steps.
        guidance: Scale of classifier-free guidance; 1 disables it.

    Raises:
        UserError: If the model does not accept the prompts or labels, or as raised by `draw_batches`.
    """
    request = Request(*pipeline.conditioning.for_request(prompts, labels, num_samples))
    batches = draw_batches(
        pipeline, request, sampler or DPMSolver(steps=20), guidance=guidance, seed=seed, batch_size=batch_size
    )
    return [image for batch in batches for image in to_pil(batch)]


def write_samples(
    folder: Path, images: Sequence[Image.Image], captions: Sequence[str | None], settings: dict[str, Any]
) -> Path:
    """Write one NNNNN.png per sample, grid.png and samples.json. Return the path of the grid.

    Args:
        settings: Settings of the sampling run, written to samples.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"{i:05d}.png" for i in range(len(images))]
    for name, image in zip(files, images, strict=True):
        image.save(folder / name)
    path = folder / "grid.png"
    grid(images[:256], captions[:256] if any(captions) else None).save(path)
    samples = [{"file": name, "caption": caption} for name, caption in zip(files, captions, strict=True)]
    content = {**settings, "samples": samples}
    (folder / "samples.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def film_strip(
    pipeline: LatentDiffusion, request: Request, sampler: SamplerLike, *, seed: int, **options: Any
) -> Image.Image:
    """Render the reverse chain of the first samples from z_T to z_0, decoding z_t at evenly spaced steps.

    Args:
        options: Additional options of `draw_batches`.
    """
    num = min(MAX_STRIP_SAMPLES, len(request))
    request = Request({k: v[:num] for k, v in request.condition.items()}, request.captions[:num])
    generators = sample_generators(seed, range(num))
    latents = [torch.stack([torch.randn(pipeline.latent_shape, generator=g) for g in generators])]
    options["on_step"] = lambda s, z_s, z_0: latents.append(z_s.cpu())
    list(draw_batches(pipeline, request, sampler, seed=seed, **options))
    columns = torch.linspace(0, len(latents) - 1, min(MAX_STRIP_COLUMNS, len(latents))).round().long()
    frames = [to_pil(pipeline.decode(latents[i].to(pipeline.device))) for i in columns]
    return labelled_rows(
        [(str(request.captions[i] or f"sample {i}"), [frame[i] for frame in frames]) for i in range(num)]
    )


def sampler_settings(sampler: SamplerLike) -> dict[str, Any]:
    """Return the sampler's method and options as plain values."""
    options: Any = sampler
    return {"method": sampler.method, **asdict(options)}
