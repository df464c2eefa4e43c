"""Constructor names from earlier versions, which still appear in the configs of existing runs."""

from typing import Any

SAMPLER = "ldm.diffusion.sampler.Sampler"
SAMPLERS = {
    "ddim": "ldm.diffusion.samplers.ddim.DDIM",
    "ddpm": "ldm.diffusion.samplers.ddpm.DDPM",
    "dpmpp": "ldm.diffusion.samplers.multistep.DPMSolver",
    "unipc": "ldm.diffusion.samplers.multistep.UniPC",
}
"""Replacements for SAMPLER, the only sampler class in earlier versions, by its `method` argument."""

MOVED_TARGETS = {
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

FLATTENED_GROUPS = ("adversarial", "perceptual")
"""Groups whose constructor was nested under `build` in earlier versions."""


def update_targets(config: Any) -> Any:
    """Return a config, as plain values, with every `_target_` replaced by its current name."""
    if isinstance(config, list):
        return [update_targets(item) for item in config]
    if not isinstance(config, dict):
        return config
    updated = {}
    for key, value in config.items():
        if key in FLATTENED_GROUPS and isinstance(value, dict) and "build" in value:
            value = value["build"]
        is_target = key == "_target_" and isinstance(value, str)
        updated[key] = MOVED_TARGETS.get(value, value) if is_target else update_targets(value)
    if updated.get("_target_") == SAMPLER and (method := str(updated.get("method"))) in SAMPLERS:
        unused = {"method", "eta", "variance"} - {"ddim": {"eta"}, "ddpm": {"variance"}}.get(method, set())
        updated = {key: value for key, value in updated.items() if key not in unused} | {"_target_": SAMPLERS[method]}
    return updated
