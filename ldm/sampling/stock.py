"""Stock pipelines of diffusers: writes StableDiffusionPipeline and DDPMPipeline, and reads StableDiffusionPipeline.

Every model opens in diffusers as a `LatentDiffusionPipeline`. A stock pipeline fits only some models, but those work in
all programs that know Stable Diffusion.
"""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn

from ldm.autoencoder.autoencoder import Autoencoder, LatentStatistics, published_statistics, weights_sha256
from ldm.autoencoder.sampling_decoder import model_for_samples
from ldm.diffusion.schedule import NoiseSchedule, from_betas, linear, scaled_linear
from ldm.errors import UserError
from ldm.files.models import load_model
from ldm.files.untrusted import check_fields, read_json
from ldm.latents.contract import CONTRACT_FILE, LatentContract
from ldm.networks.conditioning import NoCondition, TextCondition
from ldm.networks.unet import ImageUNet, StableDiffusionUNet
from ldm.runtime import shell
from ldm.sampling.pipeline import INDEX_FILE, LatentDiffusion

PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "z_0": "sample"}
"""Our names of predictions -> those of diffusers' schedulers."""
BETA_SCHEDULES = {"linear": linear, "scaled_linear": scaled_linear}
NUM_TOKENS = 77


def to_stock(pipeline: LatentDiffusion) -> DiffusionPipeline:
    """Return a model as a StableDiffusionPipeline, or as a DDPMPipeline if it is unconditional and works on pixels.

    Stable Diffusion has one scaling factor for all channels. The standardisation of the latents is therefore folded
    into the autoencoder, whose latents then are the standardised ones, with a scaling factor of 1.

    Raises:
        UserError: A part of the model does not fit. The message names it.
    """
    is_stable_diffusion = not pipeline.autoencoder.is_identity
    if missing := _missing_options(pipeline, is_stable_diffusion):
        kind = "StableDiffusionPipeline" if is_stable_diffusion else "DDPMPipeline"
        stage = ["stage=all"] if is_stable_diffusion else ["stage=diffusion", "vae=identity"]
        raise UserError(
            f"{pipeline.run} does not fit into a {kind}, which needs a model trained with other options: "
            f"{shell.train_command(*stage, *missing)}. Its native pipeline opens in diffusers too: use format=native."
        )
    chain: dict[str, Any] = {
        "num_train_timesteps": pipeline.schedule.num_steps,
        "trained_betas": pipeline.schedule.betas.tolist(),
        "prediction_type": PREDICTION_TYPES[pipeline.prediction],
        "timestep_spacing": "trailing",
    }
    if not is_stable_diffusion:
        scheduler = DDPMScheduler(**chain, variance_type=pipeline.variance, clip_sample=False)
        return DDPMPipeline(_as(UNet2DModel, pipeline.network), scheduler)
    assert isinstance(pipeline.conditioning, TextCondition)
    encoder = pipeline.conditioning.encoder
    # its import, which prints warnings, is delayed until here; it also warns of an offset other than 1, though unused
    return diffusers.StableDiffusionPipeline(
        vae=fold_standardisation(pipeline.autoencoder),
        text_encoder=encoder.model,
        tokenizer=encoder.tokenizer,
        unet=_as(UNet2DConditionModel, pipeline.network),
        scheduler=DPMSolverMultistepScheduler(**chain, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_stock(pipeline: LatentDiffusion, folder: Path) -> None:
    """Write the stock pipeline, and the contract with the digests of both autoencoders: as trained, and as written."""
    stock = to_stock(pipeline)
    stock.save_pretrained(folder)
    content = asdict(pipeline.contract)
    if (vae := getattr(stock, "vae", None)) is not None:
        content["folded_autoencoder_sha256"] = weights_sha256(vae)
    (folder / CONTRACT_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _missing_options(pipeline: LatentDiffusion, is_stable_diffusion: bool) -> list[str]:
    """Return the training options with which a model would fit the stock pipeline, where this model does not."""
    conditioning, autoencoder, statistics = pipeline.conditioning, pipeline.autoencoder, pipeline.autoencoder.statistics
    assert statistics is not None
    can_start = bool(pipeline.schedule.alpha_bar[-1] > 0)  # stock schedulers divide by it
    needs = {"objective.prediction=eps": pipeline.prediction in PREDICTION_TYPES, "schedule=linear": can_start}
    if is_stable_diffusion:
        needs |= {
            "network=unet_sd": isinstance(pipeline.network, StableDiffusionUNet),
            "conditioning=clip_sd": isinstance(conditioning, TextCondition) and not conditioning.encoder.masked,
            "autoencoder=kl_f8": type(autoencoder.model) is AutoencoderKL,
            "variance=fixed_small": pipeline.variance != "learned_range",
        }
    else:
        is_standardised = any(statistics.latent_mean) or any(std != 1 for std in statistics.latent_std)
        needs |= {
            "network=unet": isinstance(pipeline.network, ImageUNet),
            "conditioning=none": isinstance(conditioning, NoCondition),
            "latent_statistics=published": not is_standardised,
        }
    return [option for option, fits in needs.items() if not fits]


def _as(kind: Any, network: nn.Module) -> Any:
    """Return a network as an instance of the class of diffusers from which its own is derived. Both share weights."""
    with torch.device("meta"):
        result = kind.from_config(network.config)
    result.load_state_dict(network.state_dict(), assign=True)
    return result.eval()


@torch.no_grad()
def fold_standardisation(autoencoder: Autoencoder) -> AutoencoderKL:
    """Return a copy of a KL autoencoder whose latents are the standardised ones, with the decoder for samples."""
    statistics, channels = autoencoder.statistics, autoencoder.channels
    assert statistics is not None
    mean, std = (torch.tensor(values) for values in (statistics.latent_mean, statistics.latent_std))
    model = copy.deepcopy(model_for_samples(autoencoder.model))
    for name, width in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        if getattr(model, name, None) is None:
            layer = nn.Conv2d(width, width, 1)
            nn.init.dirac_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            setattr(model, name, layer)
            model.register_to_config(**{f"use_{name}": True})
    moments, decoder_input = model.quant_conv, model.post_quant_conv
    moments.bias[:channels] = (moments.bias[:channels] - mean) / std
    moments.weight[:channels] /= std[:, None, None, None]
    moments.bias[channels:] -= 2 * std.log()
    decoder_input.bias += decoder_input.weight[:, :, 0, 0] @ mean
    decoder_input.weight *= std[:, None, None]
    model.register_to_config(scaling_factor=1.0, shift_factor=None, latents_mean=None, latents_std=None)
    return model


def is_stable_diffusion_folder(folder: Path) -> bool:
    index = folder / INDEX_FILE
    return index.is_file() and read_json(index).get("_class_name") == "StableDiffusionPipeline"


def read_stable_diffusion(folder: Path) -> LatentDiffusion:
    """Read the folder of a StableDiffusionPipeline (Stable Diffusion 1 or 2), for training to start from.

    Its latents have the published statistics. The images that it was trained on are unknown.

    Raises:
        UserError: A part is missing or damaged, or its config has a feature of another kind of pipeline.
    """
    autoencoder = Autoencoder.load(folder / "vae")
    statistics = published_statistics(autoencoder.model)
    network = load_model(StableDiffusionUNet, folder / "unet")
    config = network.config
    for key in ("addition_embed_type", "class_embed_type", "encoder_hid_dim", "time_cond_proj_dim"):
        if config.get(key) is not None:
            raise UserError(f"{folder / 'unet' / 'config.json'}: {key}={config[key]} is not supported by init_from=.")
    if statistics is None or config.in_channels != config.out_channels or config.in_channels != autoencoder.channels:
        raise UserError(
            f"{folder}: the UNet maps {config.in_channels} to {config.out_channels} channels, and the autoencoder has "
            f"{autoencoder.channels}. All must be equal, as in Stable Diffusion 1 and 2 for text-to-image."
        )
    schedule, prediction = _read_chain(folder / "scheduler" / "scheduler_config.json")
    digest, data = autoencoder.weights_sha256(), "unknown"
    autoencoder.statistics = LatentStatistics(*statistics, decoder_scale=[1.0] * 3, data=data, weights_sha256=digest)
    side = config.sample_size
    return LatentDiffusion(
        network=network,
        autoencoder=autoencoder,
        schedule=schedule,
        prediction=prediction,
        conditioning=TextCondition(str(folder), NUM_TOKENS, masked=False),
        contract=LatentContract(
            digest, data, side * autoencoder.factor, autoencoder.factor, autoencoder.channels, 0.0, False
        ),
        latent_shape=(autoencoder.channels, side, side),
        run=str(folder),
    )


def _read_chain(file: Path) -> tuple[NoiseSchedule, str]:
    """Return the noise schedule and the prediction in a scheduler's config."""
    config = {"prediction_type": "epsilon", "beta_schedule": "linear", "trained_betas": None, **read_json(file)}
    check_fields(config, {"num_train_timesteps": int, "trained_betas": list[float] | None}, file)
    prediction = {value: key for key, value in PREDICTION_TYPES.items()}.get(str(config["prediction_type"]))
    kind = BETA_SCHEDULES.get(str(config["beta_schedule"]))
    if prediction is None or kind is None or config.get("rescale_betas_zero_snr"):
        keys = ("prediction_type", "beta_schedule", "rescale_betas_zero_snr")
        values = ", ".join(f"{key}={config.get(key)}" for key in keys)
        raise UserError(
            f"{file}: {values} is not supported. The prediction must be one of {', '.join(PREDICTION_TYPES.values())}, "
            f"the schedule {' or '.join(BETA_SCHEDULES)}, without rescaling."
        )
    try:
        if config["trained_betas"] is not None:
            betas: Tensor = torch.tensor(config["trained_betas"], dtype=torch.float64)
            return from_betas("trained_betas", betas), prediction
        check_fields(config, {"beta_start": float, "beta_end": float}, file)
        return kind(config["num_train_timesteps"], config["beta_start"], config["beta_end"]), prediction
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{file} contains no valid noise schedule: {error}.") from error
