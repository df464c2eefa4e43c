"""Decode the latents in a safetensors file into images."""

from pathlib import Path

from omegaconf import DictConfig

from ldm.files.untrusted import to_file_name
from ldm.image_grid import grid, to_pil
from ldm.latents.files import decode_file
from ldm.runs.run import Run
from ldm.runtime.device import choose_device


def decode_latents(config: DictConfig) -> None:
    autoencoder = Run.open(config.run).autoencoder().to(choose_device(config.device))
    batches, names = decode_file(autoencoder, Path(config.latents).expanduser(), config.batch_size)
    images = [image for batch in batches for image in to_pil(batch)]
    out = Path(config.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    for i, (image, name) in enumerate(zip(images, names, strict=True)):
        image.save(out / f"{i:05d}_{to_file_name(Path(name).stem)}.png")
    grid(images[:256]).save(out / "grid.png")
    print(f"{len(images)} images saved to {out}; overview: {out / 'grid.png'}")
