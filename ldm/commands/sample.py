"""Generate images with a trained model: PNG files, a grid, and a JSON file with the settings."""

from pathlib import Path

from omegaconf import DictConfig

from ldm.cli import main as command
from ldm.image_grid import to_pil
from ldm.runs.run import Run
from ldm.runtime.device import choose_device
from ldm.sampling.draw import draw_batches, film_strip, sampler_settings, write_samples
from ldm.sampling.request import Request


def sample(config: DictConfig) -> None:
    run = Run.open(config.run)
    pipeline = run.pipeline().to(choose_device(config.device))
    sampler = command.construct(config.sampler)
    selection = {key: config[key] for key in ("prompt", "prompts", "label", "num_samples")}
    request = Request.from_options(pipeline, **selection)
    options = {key: config[key] for key in ("guidance", "guidance_interval", "seed")}
    batches = draw_batches(pipeline, request, sampler, batch_size=config.batch_size, **options)
    images = [image for batch in batches for image in to_pil(batch)]
    out = Path(config.out).expanduser() if config.out else run.path / "samples"
    settings = {
        "run": str(run.path),
        "autoencoder_sha256": pipeline.contract.autoencoder_sha256,
        "sampler": sampler_settings(sampler),
        **options,
        "guidance_interval": list(config.guidance_interval),
        "versions": run.facts["versions"],
    }
    path = write_samples(out, images, request.captions, settings)
    print(f"{len(images)} samples saved to {out}; overview: {path}")
    if config.strip:
        film_strip(pipeline, request, sampler, **options).save(out / "strip.png")
        print(f"reverse chain, from noise to image: {out / 'strip.png'}")
