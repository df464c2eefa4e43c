"""Show the forward chain on one image, with z_t decoded at several t."""

from pathlib import Path

from omegaconf import DictConfig

from ldm.data.pixels import read_image
from ldm.image_grid import grid, to_pil
from ldm.runs.run import Run
from ldm.runtime.device import choose_device


def forward(config: DictConfig) -> None:
    run = Run.open(config.run)
    pipeline = run.pipeline().to(choose_device(config.device))
    image = read_image(config.image, pipeline.contract.resolution)
    steps, frames = pipeline.forward_chain(image, steps=config.steps, seed=config.seed)
    out = Path(config.out).expanduser() if config.out else run.images / "forward.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    captions = ["original", *(f"t = {t}" for t in steps)]
    title = f"Forward chain with T = {pipeline.schedule.num_steps}, decoded z_t"
    grid([*to_pil(image), *to_pil(frames)], captions, columns=6, title=title).save(out)
    print(f"z_t decoded at t = {', '.join(map(str, steps))}: {out}")
