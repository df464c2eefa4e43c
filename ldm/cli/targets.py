"""The names that constructors had in earlier versions, in whose runs and configs they still stand."""

from typing import Any

SAMPLER = "ldm.diffusion.sampler.Sampler"
SAMPLERS = {
    "ddim": "ldm.diffusion.samplers.ddim.DDIM",
    "ddpm": "ldm.diffusion.samplers.ddpm.DDPM",
    "dpmpp": "ldm.diffusion.samplers.multistep.DPMSolver",
    "unipc": "ldm.diffusion.samplers.multistep.UniPC",
}
"""What SAMPLER, the one class of earlier versions, was by its `method`."""

MOVED = {
    "ldm.autoencoder.loss.AutoencoderLoss": "ldm.autoencoder.losses.AutoencoderLoss",
    "ldm.autoencoder.loss.Perceptual": "ldm.autoencoder.perceptual.Perceptual",
    "ldm.autoencoder.regulariser.KL": "ldm.autoencoder.regularisers.KL",
    "ldm.autoencoder.regulariser.Unregularised": "ldm.autoencoder.regularisers.Unregularised",
    "ldm.autoencoder.regulariser.VectorQuantised": "ldm.autoencoder.regularisers.VectorQuantised",
    "ldm.data.fashion_mnist.FashionMNIST": "ldm.data.sources.fashion_mnist.FashionMNIST",
    "ldm.data.huggingface.HuggingFace": "ldm.data.sources.huggingface.HuggingFace",
    "ldm.data.image_folder.ImageFolder": "ldm.data.sources.image_folder.ImageFolder",
    "ldm.data.openmoji.OpenMoji": "ldm.data.sources.openmoji.OpenMoji",
    "ldm.diffusion.ode.ODESampler": "ldm.diffusion.continuous.ode.ODESampler",
    "ldm.diffusion.sde.SDESampler": "ldm.diffusion.continuous.sde.SDESampler",
    "ldm.features.EfficientNetLiteDistance": "ldm.autoencoder.perceptual.EfficientNetLiteDistance",
    "ldm.features.LPIPS": "ldm.autoencoder.perceptual.LPIPS",
    "ldm.run.find_autoencoder": "ldm.runs.load.find_autoencoder",
    "ldm.training.adversary.Adversary": "ldm.training.modules.adversary.Adversary",
    "ldm.training.diffusion.Objective": "ldm.diffusion.objective.Objective",
    "ldm.training.diffusion_stage.DiffusionStage": "ldm.training.stages.diffusion.DiffusionStage",
    "ldm.training.diffusion_stage.class_condition": "ldm.networks.conditioning.class_condition",
    "ldm.training.diffusion_stage.no_condition": "ldm.networks.conditioning.no_condition",
    "ldm.training.diffusion_stage.text_condition": "ldm.networks.conditioning.text_condition",
    "ldm.training.modules.diffusion.Objective": "ldm.diffusion.objective.Objective",
    "ldm.training.muon.MuonAdamW": "ldm.training.optim.muon.MuonAdamW",
    "ldm.training.vae_stage.VAEStage": "ldm.training.stages.autoencoder.VAEStage",
}

FLATTENED = ("adversarial", "perceptual")
"""Groups whose constructor stood one level down, in `build`, with their own keys as its arguments."""


def with_current_targets(config: Any) -> Any:
    """Plain values in which each `_target_` has its present name."""
    if isinstance(config, list):
        return [with_current_targets(part) for part in config]
    if not isinstance(config, dict):
        return config
    current = {}
    for key, value in config.items():
        if key in FLATTENED and isinstance(value, dict) and "build" in value:
            value = value["build"]
        moved = key == "_target_" and isinstance(value, str)
        current[key] = MOVED.get(value, value) if moved else with_current_targets(value)
    if current.get("_target_") == SAMPLER and (method := str(current.get("method"))) in SAMPLERS:
        unused = {"method", "eta", "variance"} - {"ddim": {"eta"}, "ddpm": {"variance"}}.get(method, set())
        current = {key: value for key, value in current.items() if key not in unused} | {"_target_": SAMPLERS[method]}
    return current
