"""Samples from a pipeline: drawing in batches, film strips, and the files they leave."""

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
from ldm.image_grid import grid, rows, to_pil
from ldm.progress import progress
from ldm.rules import Count, Number, Seed, checked
from ldm.runtime.random import sample_generators
from ldm.sampling.pipeline import LatentDiffusionPipeline
from ldm.sampling.request import Request

STRIP_SAMPLES = 4
STRIP_COLUMNS = 11


def _read_interval(interval: Any) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in interval)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise ValueError(
            "must be the lowest and the highest u = t / T at which guidance acts, such as guidance_interval=[0.2,0.8]"
        )
    return low, high


Guidance = Annotated[Number, Field(ge=-1e6, le=1e6)]
"""The scale of classifier-free guidance; 1 is none."""
Interval = Annotated[tuple[float, float], BeforeValidator(_read_interval)]
"""Of u = t / T, at which guidance acts."""


def check_sampler(sampler: SamplerLike, schedule: NoiseSchedule) -> None:
    """Refuse a sampler that does not fit a chain.

    Raises:
        UserError: naming the sampler.
    """
    try:
        sampler.check(schedule)
    except ValueError as error:
        raise UserError(f"sampler={sampler.method} with {sampler.steps} steps: {error}.") from error


@checked
def draw(
    pipeline: LatentDiffusionPipeline,
    request: Request,
    sampler: SamplerLike,
    *,
    guidance: Guidance,
    guidance_interval: Interval = (0.0, 1.0),
    seed: Seed,
    batch_size: Count = 64,
    first: int = 0,
    on_step: OnStep | None = None,
) -> Iterator[Tensor]:
    """Images [b, 3, H, W] in [-1, 1], batch by batch, with a progress bar over samples x steps.

    Args:
        first: The sample to begin with; sample i depends on the seed and i alone, so what was drawn can go on.

    Raises:
        UserError: a sampler that does not fit the model, a solver that does not converge.
    """
    check_sampler(sampler, pipeline.schedule)
    pipeline.check_sigma(sampler.variance)
    total = len(request)
    with progress() as bar:
        task = bar.add_task("sampling", total=total, completed=first)
        done = first

        def step(s: float, z_s: Tensor, z_0: Tensor) -> None:
            # how far down the chain, which an adaptive solver knows of itself where it cannot count its steps
            share = 1 - s / pipeline.schedule.num_steps
            bar.update(task, completed=done + share * min(batch_size, total - done))
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
                raise UserError(f"sampler={sampler.method} failed: {error}. Choose a larger sampler.rtol=.") from error
            done = stop
            yield pipeline.decode(z).cpu()


def draw_images(
    pipeline: LatentDiffusionPipeline,
    *,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int | str] | None = None,
    num_samples: int = 16,
    sampler: SamplerLike | None = None,
    guidance: float = 3.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[Image.Image]:
    """Images for prompts or for classes, by their number or name; image i depends on the seed and i alone.

    >>> from ldm import DDIM, Run, draw_images
    >>> pipeline = Run.open("runs/diffusion/demo").pipeline()
    >>> first, second = draw_images(pipeline, labels=["cat", 1], sampler=DDIM(steps=5), seed=3)
    >>> first.size
    (8, 8)

    Args:
        num_samples: Where neither is given: without a prompt, or of all classes in turn.
        sampler: None: DPM-Solver++ of 20 steps.
        guidance: Scale of classifier-free guidance; 1 is none.

    Raises:
        UserError: prompts or labels that the model does not take, and what `draw` refuses.
    """
    request = Request(*pipeline.conditioning.of_request(prompts, labels, num_samples))
    batches = draw(
        pipeline, request, sampler or DPMSolver(steps=20), guidance=guidance, seed=seed, batch_size=batch_size
    )
    return [image for batch in batches for image in to_pil(batch)]


def write(folder: Path, images: Sequence[Image.Image], captions: Sequence[str | None], made_by: dict[str, Any]) -> Path:
    """NNNNN.png per sample, grid.png, samples.json; returns the grid's path."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"{i:05d}.png" for i in range(len(images))]
    for name, image in zip(files, images, strict=True):
        image.save(folder / name)
    path = folder / "grid.png"
    grid(images[:256], captions[:256] if any(captions) else None).save(path)
    samples = [{"file": name, "caption": caption} for name, caption in zip(files, captions, strict=True)]
    content = {**made_by, "samples": samples}
    (folder / "samples.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def film_strip(
    pipeline: LatentDiffusionPipeline, request: Request, sampler: SamplerLike, *, seed: int, **options: Any
) -> Image.Image:
    """The reverse chain of the first samples, from z_T to z_0: z_t decoded at equal distances in steps.

    Args:
        options: As `draw` takes them.
    """
    shown = min(STRIP_SAMPLES, len(request))
    part = Request({k: v[:shown] for k, v in request.condition.items()}, request.captions[:shown])
    generators = sample_generators(seed, range(shown))
    latents = [torch.stack([torch.randn(pipeline.latent_shape, generator=g) for g in generators])]
    list(draw(pipeline, part, sampler, seed=seed, on_step=lambda s, z_s, z_0: latents.append(z_s.cpu()), **options))
    kept = [latents[i] for i in torch.linspace(0, len(latents) - 1, min(STRIP_COLUMNS, len(latents))).round().long()]
    frames = [to_pil(pipeline.decode(z.to(pipeline.device))) for z in kept]
    return rows([(str(part.captions[i] or f"sample {i}"), [frame[i] for frame in frames]) for i in range(shown)])


def describe(sampler: SamplerLike) -> dict[str, Any]:
    """The sampler's settings, for samples.json."""
    options: Any = sampler
    return {"method": sampler.method, **asdict(options)}
