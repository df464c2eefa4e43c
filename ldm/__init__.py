"""Train your own latent diffusion model, end to end.

These names are the public Python API. They are imported lazily:

>>> import ldm
>>> run = ldm.Run.open("runs/diffusion/demo")
>>> images = ldm.draw_images(run.pipeline(), num_samples=2, seed=0)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.autoencoder.autoencoder import Autoencoder
    from ldm.diffusion.denoiser import Denoiser
    from ldm.diffusion.guidance import Guided
    from ldm.diffusion.samplers.ddim import DDIM
    from ldm.diffusion.samplers.ddpm import DDPM, ddpm_step
    from ldm.diffusion.samplers.multistep import DPMSolver
    from ldm.diffusion.schedule import NoiseSchedule, cosine
    from ldm.latents.contract import LatentContract
    from ldm.runs.run import Run
    from ldm.sampling.diffusers_pipeline import LatentDiffusionPipeline
    from ldm.sampling.draw import draw_images
    from ldm.sampling.pipeline import LatentDiffusion

_MODULES = {
    "Autoencoder": "autoencoder.autoencoder",
    "DDIM": "diffusion.samplers.ddim",
    "DDPM": "diffusion.samplers.ddpm",
    "DPMSolver": "diffusion.samplers.multistep",
    "Denoiser": "diffusion.denoiser",
    "Guided": "diffusion.guidance",
    "LatentContract": "latents.contract",
    "LatentDiffusion": "sampling.pipeline",
    "LatentDiffusionPipeline": "sampling.diffusers_pipeline",
    "NoiseSchedule": "diffusion.schedule",
    "Run": "runs.run",
    "cosine": "diffusion.schedule",
    "ddpm_step": "diffusion.samplers.ddpm",
    "draw_images": "sampling.draw",
}
__all__ = [
    "DDIM",
    "DDPM",
    "Autoencoder",
    "DPMSolver",
    "Denoiser",
    "Guided",
    "LatentContract",
    "LatentDiffusion",
    "LatentDiffusionPipeline",
    "NoiseSchedule",
    "Run",
    "cosine",
    "ddpm_step",
    "draw_images",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
