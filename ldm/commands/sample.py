"""Draw images with a trained model: PNGs, a grid and a JSON with what made them."""

from pathlib import Path

from omegaconf import DictConfig

from ldm.cli import main as command
from ldm.image_grid import to_pil
from ldm.runs.run import Run
from ldm.runtime.device import choose_device
from ldm.sampling.draw import describe, draw, film_strip, write
from ldm.sampling.request import Request


def sample(config: DictConfig) -> None:
    run = Run.open(config.run)
    pipeline = run.pipeline().to(choose_device(config.device))
    sampler = command.construct(config.sampler)
    asked = {key: config[key] for key in ("prompt", "prompts", "label", "num_samples")}
    request = Request.make(pipeline, **asked)
    options = {key: config[key] for key in ("guidance", "guidance_interval", "seed")}
    batches = draw(pipeline, request, sampler, batch_size=config.batch_size, **options)
    images = [image for batch in batches for image in to_pil(batch)]
    out = Path(config.out).expanduser() if config.out else run.path / "samples"
    made_by = {
        "run": str(run.path),
        "autoencoder_sha256": pipeline.contract.autoencoder_sha256,
        "sampler": describe(sampler),
        **options,
        "guidance_interval": list(config.guidance_interval),
        "versions": run.facts["versions"],
    }
    path = write(out, images, request.captions, made_by)
    print(f"{len(images)} samples in {out}, all of them on {path}")
    if config.strip:
        film_strip(pipeline, request, sampler, **options).save(out / "strip.png")
        print(f"the reverse chain, from noise to image: {out / 'strip.png'}")
