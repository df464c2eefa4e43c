"""Draw images with a trained model: PNGs, a grid and a JSON with what made them."""

from pathlib import Path

from omegaconf import DictConfig

from ldm.cli import main as command
from ldm.image_grid import to_pil
from ldm.runs.run import Run
from ldm.runtime.device import choose_device
from ldm.sampling.draw import check_interval, describe, draw, film_strip, write
from ldm.sampling.request import Request


def sample(config: DictConfig) -> None:
    run = Run.open(config.run)
    pipeline = run.pipeline().to(choose_device(config.device))
    sampler = command.construct(config.sampler)
    request = Request.make(
        pipeline,
        prompt=config.prompt,
        prompts=config.prompts,
        label=config.label,
        num_samples=config.num_samples,
    )
    options = {
        "guidance": config.guidance,
        "guidance_interval": config.guidance_interval,
        "seed": config.seed,
    }
    images = [
        image
        for batch in draw(pipeline, request, sampler, batch_size=config.batch_size, **options)
        for image in to_pil(batch)
    ]
    out = Path(config.out).expanduser() if config.out else run.path / "samples"
    made_by = {
        "run": str(run.path),
        "autoencoder_sha256": pipeline.contract.autoencoder_sha256,
        "sampler": describe(sampler),
        **options,
        "guidance_interval": check_interval(config.guidance_interval),
        "versions": run.facts["versions"],
    }
    path = write(out, images, request.captions, made_by)
    print(f"{len(images)} samples in {out}, all of them on {path}")
    if config.strip:
        film_strip(pipeline, request, sampler, **options).save(out / "strip.png")
        print(f"the reverse chain, from noise to image: {out / 'strip.png'}")
