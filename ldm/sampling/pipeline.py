"""A trained model with everything that sampling needs: conditioning, network, noise schedule and autoencoder.

A pipeline folder is a pipeline of diffusers (see `ldm.sampling.diffusers_pipeline`), with the latent contract, the
latent statistics and, in vae/, the decoder for reconstructions. Loading it here never unpickles or runs anything.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor, nn

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.autoencoder.sampling_decoder import model_for_samples, save_first_decoder
from ldm.diffusion.chain import check_prediction, check_z_0_mse, forward_step
from ldm.diffusion.denoiser import Condition, Denoiser
from ldm.diffusion.guidance import Guided
from ldm.diffusion.samplers.base import OnStep, SamplerLike
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import InputError, UserError
from ldm.files.atomic import write_text
from ldm.files.models import load_model
from ldm.files.untrusted import check_fields, read_json
from ldm.latents.contract import LatentContract
from ldm.networks.conditioning import Conditioning, TextCondition, restore_conditioning
from ldm.networks.dit import DiT
from ldm.networks.unet import ImageUNet, StableDiffusionUNet, TextUNet
from ldm.runtime import shell
from ldm.runtime.random import torch_generator
from ldm.sampling.diffusers_pipeline import LatentDiffusionPipeline

INDEX_FILE = "model_index.json"
FORMAT = 3
VARIANCE_FILE = "optimal_variance.json"
SETTINGS_FIELDS: dict[str, Any] = {
    "prediction": str,
    "latent_shape": list[int],
    "schedule": dict,
    "conditioning": dict,
}
"""Required settings and their types. `variance` is optional, because format 1 does not have this setting."""
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
NETWORKS: dict[str, Any] = {kind.__name__: kind for kind in (DiT, ImageUNet, StableDiffusionUNet, TextUNet)}


@dataclass
class LatentDiffusion:
    """A trained latent diffusion model, for the samplers, the likelihood and the metrics of this package.

    >>> from pathlib import Path
    >>> from ldm import LatentDiffusion
    >>> pipeline = LatentDiffusion.load(Path("runs/diffusion/demo/pipeline"))
    >>> pipeline.prediction, pipeline.variance, pipeline.latent_shape
    ('v', 'fixed_small', (4, 4, 4))

    Args:
        network: A diffusers ModelMixin, (z_t, timestep, **condition) -> output.
        autoencoder: The autoencoder, with measured latent statistics.
        schedule: The noise schedule used in training.
        prediction: What the network predicts: "eps", "z_0", "v" or "flow".
        conditioning: Unconditional, class-conditional or text-conditional.
        contract: Description of the latents that the network was trained on.
        latent_shape: (C, h, w).
        variance: Sigma of the reverse chain: "fixed_small", "fixed_large", or "learned_range" if the network learned
            Sigma.
        z_0_mse: Mean squared error of the predicted z_0 at each t on the training split, [T + 1]. It determines the
            optimal variance. None if this variance has not been fitted.
        run: Run folder of the pipeline, for messages.
    """

    network: nn.Module
    autoencoder: Autoencoder
    schedule: NoiseSchedule
    prediction: str
    conditioning: Conditioning
    contract: LatentContract
    latent_shape: tuple[int, int, int]
    variance: str = "fixed_small"
    z_0_mse: Tensor | None = None
    run: str = "RUN"

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> "LatentDiffusion":
        self.network.to(device)
        self.autoencoder.to(device)
        return self

    def check_variance(self, variance: str | None) -> None:
        """Check that the model supports a variance of the reverse chain; None means the model's own.

        Raises:
            UserError: If the variance is "learned_range" but the network did not learn Sigma, or as raised by
                `check_optimal_variance`.
        """
        if variance == "learned_range" and self.variance != "learned_range":
            rule = (
                f"needs a network that learned Sigma, but this one was trained with {self.variance}. Choose "
                "fixed_small, fixed_large or optimal, or omit the option"
            )
            raise InputError("variance", variance, rule)
        if variance == "optimal":
            self.check_optimal_variance()

    def check_optimal_variance(self) -> None:
        """Check that the optimal variance has been fitted for this model's noise schedule.

        Raises:
            UserError: If it has not been fitted. The message contains the command that fits it.
        """
        remedy = (
            f"Fit it on the training split: {shell.tool_command('likelihood', f'run={self.run}', 'variance=optimal')}"
        )
        if self.z_0_mse is None:
            raise UserError(f"The optimal variance has not been fitted for this model yet. {remedy}")
        try:
            check_z_0_mse(self.schedule, self.z_0_mse)
        except ValueError as error:
            raise UserError(f"{VARIANCE_FILE} does not match this model: {error}. Delete the file. {remedy}") from error

    @property
    def chain_sha256(self) -> str:
        """SHA-256 of alpha_bar of the noise schedule."""
        return hashlib.sha256(self.schedule.alpha_bar.cpu().numpy().tobytes()).hexdigest()

    def denoiser(self) -> Denoiser:
        def predict(z_t: Tensor, timestep: Tensor, condition: Condition | None) -> Tensor:
            return self.network(z_t, timestep, **(condition or {}))

        return Denoiser(self.schedule, predict, self.prediction, self.variance == "learned_range")

    @torch.no_grad()
    def sample(
        self,
        sampler: SamplerLike,
        condition: Condition,
        generators: list[torch.Generator],
        *,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Sample standardised latents z_0 [b, C, h, w], with one CPU generator per sample.

        Args:
            condition: Tensors with one row per sample; {} to sample without a condition.
            guidance: Scale of classifier-free guidance; 1 disables it.
            guidance_interval: Lowest and highest u = t / T at which guidance applies.
            on_step: Called after each sampler step.
        """
        self.network.eval()
        denoiser: Any = self.denoiser()
        if guidance != 1 and condition:
            null = {name: value.to(self.device) for name, value in self.conditioning.null().items()}
            denoiser = Guided(denoiser, guidance, null, guidance_interval)
        noise = torch.stack([torch.randn(self.latent_shape, generator=g) for g in generators]).to(self.device)
        condition = {name: value.to(self.device) for name, value in condition.items()}
        sigma: dict[str, Any] = {"variance": self.variance, "z_0_mse": self.z_0_mse}
        return sampler(denoiser, noise, condition, **sigma, generator=generators, on_step=on_step)

    def decode(self, z: Tensor) -> Tensor:
        """Decode standardised latents of samples to images [b, 3, H, W] in [-1, 1]."""
        return self.autoencoder.decode_samples(self.autoencoder.unstandardise(z))

    @torch.no_grad()
    def forward_chain(self, image: Tensor, *, steps: int, seed: int) -> tuple[list[int], Tensor]:
        """Run the forward chain q(z_t | z_s) on one image, and decode z_t at `steps` + 1 evenly spaced times.

        Args:
            image: Image [1, 3, H, W] in [-1, 1].

        Returns:
            The times t and the decoded images, [steps + 1, 3, H, W].
        """
        mean, _ = self.autoencoder.encode(image)
        generator = torch_generator(seed)
        times = sorted(set(torch.linspace(0, self.schedule.num_steps, steps + 1).round().long().tolist()))
        z_t = self.autoencoder.standardise(mean)
        frames = [self.autoencoder.decode(self.autoencoder.unstandardise(z_t))]
        for s, t in zip(times, times[1:], strict=False):
            eps = torch.randn(z_t.shape, generator=generator).to(z_t)
            z_t = forward_step(self.schedule, z_t, s, t, eps)
            frames.append(self.autoencoder.decode(self.autoencoder.unstandardise(z_t)))
        return times, torch.cat(frames)

    def to_diffusers(self, *, with_text_encoder: bool = True) -> LatentDiffusionPipeline:
        """Return the model as a pipeline of diffusers, with DPM-Solver++ as its scheduler. Both share their weights.

        Args:
            with_text_encoder: False for a pipeline that downloads its text encoder from the Hugging Face Hub.
        """
        text = {}
        if isinstance(self.conditioning, TextCondition) and with_text_encoder:
            encoder = self.conditioning.encoder
            text = {"text_encoder": encoder.model, "tokenizer": encoder.tokenizer}
        statistics = self.autoencoder.statistics
        assert statistics is not None
        settings = {
            "format": FORMAT,
            "prediction": self.prediction,
            "variance": self.variance,
            "latent_shape": list(self.latent_shape),
            "latent_mean": statistics.latent_mean,
            "latent_std": statistics.latent_std,
            "factor": self.autoencoder.factor,
            "conditioning": self.conditioning.state(),
            "schedule": {"name": self.schedule.name, "alpha_bar": self.schedule.alpha_bar.tolist()},
        }
        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=self.schedule.num_steps,
            trained_betas=self.schedule.betas.tolist(),
            prediction_type="sample",
            timestep_spacing="trailing",
        )
        vae = model_for_samples(self.autoencoder.model)
        return LatentDiffusionPipeline(self.network, vae, scheduler, **text, settings=settings)

    def save(self, folder: Path, *, with_text_encoder: bool = True) -> None:
        """Write the model as a pipeline of diffusers, with the files that only this package needs."""
        self.to_diffusers(with_text_encoder=with_text_encoder).save_pretrained(folder)
        self.autoencoder.save_statistics(folder / "vae")
        save_first_decoder(self.autoencoder.model, folder / "vae")
        self.contract.save(folder)
        if self.z_0_mse is None:
            (folder / VARIANCE_FILE).unlink(missing_ok=True)  # the variance was fitted to the previous weights

    @classmethod
    def load(cls, folder: Path) -> "LatentDiffusion":
        """Load a pipeline folder.

        Raises:
            UserError: If it is not a pipeline folder, has an unsupported format, or contains files that do not
                match each other.
        """
        path = folder / INDEX_FILE
        if not path.is_file():
            raise UserError(
                f"{folder} is not a pipeline folder: {INDEX_FILE} is missing. Train a pipeline: "
                "python -m ldm.train stage=diffusion"
            )
        index = read_json(path)
        settings = index.get("settings", index)  # formats 1 and 2 have the settings in the index itself
        if not isinstance(settings, dict) or settings.get("format") not in range(1, FORMAT + 1):
            version = settings.get("format") if isinstance(settings, dict) else None
            raise UserError(
                f"{path} has format {version}; this version of ldm reads formats 1 to {FORMAT} of its own pipelines, "
                "and no pipelines of other programs."
            )
        check_fields(settings, SETTINGS_FIELDS, path)
        name = index.get("network")
        if settings is not index:
            check_fields(index, {"network": list[str]}, path)
            name = index["network"][-1] if index["network"] else None
        if settings.get("variance", VARIANCES[0]) not in VARIANCES:
            raise UserError(f"{path}: unknown variance {settings['variance']}. Choose from {', '.join(VARIANCES)}.")
        schedule = _schedule(settings["schedule"], settings["prediction"], path)
        autoencoder = Autoencoder.load(folder / "vae")
        contract = LatentContract.load(folder)
        if (digest := autoencoder.weights_sha256()) != contract.autoencoder_sha256:
            raise UserError(
                f"{folder} was trained on latents of the autoencoder {contract.autoencoder_sha256[:12]}, but "
                f"{folder / 'vae'} contains the autoencoder {digest[:12]}. Restore the one used in training."
            )
        network: Any = load_network(folder / "network", str(name))
        side = contract.resolution // max(1, contract.factor)
        shape = (contract.channels, side, side)
        if tuple(settings["latent_shape"]) != shape or network.config.in_channels != contract.channels:
            raise UserError(
                f"{path}: the latent shape {settings['latent_shape']} and a network with {network.config.in_channels} "
                f"input channels do not match {folder / 'contract.json'}, which implies the shape {list(shape)}. "
                "Restore the files that training wrote."
            )
        return cls(
            network=network,
            autoencoder=autoencoder,
            schedule=schedule,
            prediction=settings["prediction"],
            conditioning=restore_conditioning(settings["conditioning"], path),
            contract=contract,
            latent_shape=tuple(settings["latent_shape"]),
            variance=settings.get("variance", VARIANCES[0]),  # format 1 does not have this setting
            z_0_mse=load_z_0_mse(folder),
        )


def _schedule(content: dict[str, Any], prediction: str, path: Path) -> NoiseSchedule:
    check_fields(content, {"name": str, "alpha_bar": list[float]}, path)
    try:
        schedule = NoiseSchedule(content["name"], torch.tensor(content["alpha_bar"], dtype=torch.float64))
        check_prediction(prediction, schedule.alpha_bar)
    except ValueError as error:
        raise UserError(
            f"{path} contains no valid noise schedule: {error}. Restore the file that training wrote."
        ) from error
    return schedule


def save_z_0_mse(folder: Path, table: Tensor, settings: dict[str, Any]) -> None:
    """Save the z_0 MSE table, which determines the optimal Sigma, to a pipeline folder with the settings of the fit."""
    content = {"format": FORMAT, **settings, "z_0_mse": table.tolist()}
    write_text(folder / VARIANCE_FILE, json.dumps(content, indent=2) + "\n")


def load_z_0_mse(folder: Path) -> Tensor | None:
    """Load the z_0 MSE table, which determines the optimal Sigma; None if it has not been fitted."""
    path = folder / VARIANCE_FILE
    if not path.is_file():
        return None
    content = read_json(path)
    check_fields(content, {"z_0_mse": list[float]}, path)
    return torch.tensor(content["z_0_mse"], dtype=torch.float64)


def load_network(folder: Path, name: str) -> nn.Module:
    """Load one of this package's networks from safetensors.

    Raises:
        UserError: If the class name of the network is unknown or the folder does not exist.
    """
    if name not in NETWORKS:
        raise UserError(f"{folder} contains an unknown network {name}. Supported networks: {', '.join(NETWORKS)}.")
    return load_model(NETWORKS[name], folder)
