"""Latents in a safetensors file -> images."""

from pathlib import Path

from omegaconf import DictConfig

from ldm import command


def decode(config: DictConfig) -> None:
    from ldm.device import choose_device
    from ldm.latent_files import decode_file
    from ldm.pictures import grid, to_pil
    from ldm.run import Run
    from ldm.untrusted import file_name

    autoencoder = Run.open(config.run).autoencoder().to(choose_device(config.device))
    batches, names = decode_file(autoencoder, Path(config.latents).expanduser(), config.batch_size)
    images = [image for batch in batches for image in to_pil(batch)]
    out = Path(config.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    for i, (image, name) in enumerate(zip(images, names, strict=True)):
        image.save(out / f"{i:05d}_{file_name(Path(name).stem)}.png")
    grid(images[:256]).save(out / "grid.png")
    print(f"{len(images)} images in {out}, the first of them on {out / 'grid.png'}")


def main() -> None:
    command.run("decode", decode)


if __name__ == "__main__":
    main()
