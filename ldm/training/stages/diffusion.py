"""Stage 2: builds and trains the diffusion pipeline from latents, conditions and a network."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import torch
from pydantic import Field
from torch import nn

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.data.images import ImageData
from ldm.data.order import epoch_draws
from ldm.diffusion.objective import Objective
from ldm.diffusion.samplers.base import SamplerLike
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.files.atomic import atomic_folder
from ldm.image_grid import grid
from ldm.latents.captions import open_captions
from ldm.latents.statistics import StatisticsType, encode_latents, resolve_statistics
from ldm.networks.class_embedding import ClassChange, replace_classes
from ldm.networks.conditioning import Conditioning, TextCondition, clip_sd_condition
from ldm.networks.unet import unet_sd
from ldm.rules import Depth, Flag, Fraction, Integer, Number, Positive, Size, apply_rules
from ldm.runs.load import find_pipeline, load_autoencoder, load_pipeline
from ldm.runs.run import Run, data_of_autoencoder, is_same_data
from ldm.runtime import shell
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training.modules.diffusion import NUM_BANDS, DiffusionTraining, LatentBatch
from ldm.training.optim.factory import OptimizerFactory
from ldm.training.stages.base import Stage


class NetworkSizes(TypedDict, total=False):
    """Rules for the sizes of both network architectures, by argument name."""

    patch_size: Size
    hidden_dim: Size
    depth: Depth
    head_dim: Size
    num_heads: Size
    mlp_ratio: Annotated[Positive, Field(le=1000)]
    cross_attention_every: Annotated[Integer, Field(ge=0)]
    block_out_channels: list[Size]
    layers_per_block: Depth
    attention_levels: list[Annotated[Integer, Field(ge=0)]]
    norm_num_groups: Size
    scale_shift: Flag


class DiffusionStage(Stage):
    """Stage 2: trains the diffusion model.

    Args:
        network: Builds the network from sample_size, in_channels, out_channels and the conditioning's options.
        variance: Sigma of the reverse chain. None selects "learned_range" if the objective trains Sigma, otherwise
            "fixed_small".
        conditioning: Builds the conditioning from the images.
        sampler: Sampler for the sample grids during training.
        prompts: Captions for the sample grid. An empty list selects the first validation captions.
        device: Device on which the images are encoded.
        find_autoencoder: Finds the autoencoder for the images. Returns the autoencoder and its source.
        latent_statistics: Source of the statistics that standardise the latents.
        init_from: Run, pipeline folder or hub id of a network to fine-tune instead of building a new one; also a
            StableDiffusionPipeline.
    """

    kind = "diffusion"

    def __init__(
        self,
        *,
        network: Callable[..., nn.Module],
        schedule: NoiseSchedule,
        objective: Objective,
        variance: str | None,
        conditioning: Callable[[ImageData], Conditioning],
        drop_condition: Fraction,
        sampler: SamplerLike,
        guidance: Number,
        prompts: list[str],
        optimizer: Callable[..., torch.optim.Optimizer],
        images: ImageData,
        flip: Flag,
        cache_dir: str | None,
        seed: int,
        folder: Path,
        device: torch.device,
        find_autoencoder: Callable[..., tuple[Autoencoder, str]],
        latent_statistics: Annotated[StatisticsType, Field()] = "measured",
        init_from: str | None = None,
    ) -> None:
        self.images, self.seed = images, seed
        self.class_change: ClassChange | None = None
        sigma = objective.variance(variance)
        conditions = conditioning(images)
        source = None if init_from is None else load_pipeline(init_from)
        autoencoder, self.vae = find_autoencoder(images=images)
        self.autoencoder_data = data_of_autoencoder(self.vae, autoencoder)
        autoencoder.to(device)
        mean_and_std = resolve_statistics(autoencoder, latent_statistics)
        if source is not None:
            _check_init_from(source, autoencoder, conditions, objective, schedule, sigma)
            statistics = source.autoencoder.statistics
            assert statistics is not None
            mean_and_std = statistics.latent_mean, statistics.latent_std  # the network was trained with this scaling
        self.contract, self.latents = encode_latents(autoencoder, images, flip, cache_dir, mean_and_std=mean_and_std)
        self.lookup_condition = conditions.lookup(images, partial(open_captions, cache_dir=cache_dir))
        self.pipeline = LatentDiffusion(
            network=self._build(network, conditions, sigma) if source is None else self._adapt(source, conditions),
            autoencoder=autoencoder,
            schedule=schedule,
            prediction=objective.prediction,
            conditioning=conditions,
            contract=self.contract,
            latent_shape=self.latents.shape,
            variance=sigma,
        )
        self.module = DiffusionTraining(
            self.pipeline,
            objective,
            OptimizerFactory(optimizer),
            drop_condition=drop_condition,
            seed=seed,
            grid_conditions=conditions.examples(images, prompts),
            sampler=sampler,
            guidance=guidance,
            figures_dir=folder / "images",
        )

    def _build(self, network: Callable[..., nn.Module], conditioning: Conditioning, variance: str) -> nn.Module:
        """Build a new network that fits the shape of the latents."""
        channels, side, _ = self.latents.shape
        outputs = 2 * channels if variance == "learned_range" else channels
        options = conditioning.network_options()
        try:
            return network(sample_size=side, in_channels=channels, out_channels=outputs, **options).train()
        except ValueError as error:
            raise UserError(f"This network is unsuitable for {channels} x {side} x {side} latents: {error}.") from error

    def _adapt(self, source: LatentDiffusion, conditioning: Conditioning) -> nn.Module:
        """Return the network from `init_from`, adapted to the classes of these images."""
        network, old, new = source.network, source.conditioning.class_names, conditioning.class_names
        if old is not None and new is not None:
            network = replace_classes(network, old, new)
            self.class_change = ClassChange.between(old, new)
        return network.requires_grad_(True).train()

    @classmethod
    def check(cls, resolution: int, **options: Any) -> None:
        network, conditioning = options["network"], options["conditioning"]
        apply_rules(cls, options)
        apply_rules(NetworkSizes, network.keywords)
        apply_rules(conditioning.func, conditioning.keywords)
        if (network.func is unet_sd) != (conditioning.func is clip_sd_condition):
            raise UserError("network=unet_sd and conditioning=clip_sd need each other. Use both, or neither.")
        try:
            with torch.device("meta"):
                text = {"text_dim": 8} if network.func is unet_sd else {}
                network(sample_size=resolution, in_channels=1, out_channels=1, **text)
        except ValueError as error:
            raise UserError(f"The options network.* do not define a valid network: {error}.") from error
        if options["latent_statistics"] != "measured" and options["init_from"] is not None:
            raise UserError(
                "init_from= keeps the latent statistics that its network was trained with. Remove latent_statistics=."
            )
        if options["init_from"] is not None:
            find_pipeline(options["init_from"])
        schedule, objective = options["schedule"], options["objective"]
        variance = objective.variance(options["variance"])
        try:
            objective.check(variance, schedule.alpha_bar)
            options["sampler"].check(schedule)
            sigma = options["sampler"].variance
            if sigma == "optimal" or (sigma == "learned_range" and variance != "learned_range"):
                raise ValueError(f"sampler.variance={sigma} is incompatible with a network of variance={variance}")
            if schedule.num_steps < NUM_BANDS:
                raise ValueError(f"the chain must have at least {NUM_BANDS} steps; got {schedule.num_steps}")
        except ValueError as error:
            raise UserError(f"objective=, variance=, schedule= and sampler= are not compatible: {error}.") from error
        if (vae := options["find_autoencoder"].keywords["vae"]) is not None:
            load_autoencoder(vae).latent_shape(resolution)

    def fetch(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> LatentBatch:
        views = [self.latents.batch(indices, view) for view in range(self.latents.moments.shape[1])]
        draws = None
        if epochs is not None:
            by_epoch = {e: epoch_draws(len(self.images), self.seed, e).numpy() for e in set(epochs.tolist())}
            draws = np.array([by_epoch[e][i] for e, i in zip(epochs.tolist(), indices.tolist(), strict=True)])
        return {
            "mean": torch.stack([mean for mean, _ in views], dim=1),
            "log_variance": torch.stack([log_variance for _, log_variance in views], dim=1),
            "condition": self.lookup_condition(indices, draws),
        }

    def summary_rows(self) -> list[tuple[str, str]]:
        network = self.pipeline.network
        parameters = sum(p.numel() for p in network.parameters())
        channels, height, width = self.latents.shape
        patch = getattr(network.config, "patch_size", 1)
        warnings = []
        trained_on = self.autoencoder_data or {}
        if trained_on and not is_same_data(trained_on, self.images):
            data = f"{self.images.name} {self.images.fingerprint[:8]}"
            mismatch = f"the autoencoder was trained on different data: {trained_on['description']}"
            warnings.append(("warning", f"{mismatch}, while this run trains on {data}"))
        return [
            ("autoencoder", self.vae),
            *warnings,
            ("model", f"{type(network).__name__}, {parameters / 1e6:.1f} M parameters"),
            ("latent", f"{channels} x {height} x {width} from {self.contract.resolution} px"),
            ("tokens", f"{height * width // patch**2} patches of {patch} x {patch}"),
            ("conditioning", self.pipeline.conditioning.kind),
            *([("classes of init_from", str(self.class_change))] if self.class_change is not None else []),
            ("chain", f"{self.pipeline.schedule.name}, T = {self.pipeline.schedule.num_steps}"),
            ("prediction", self.pipeline.prediction),
            ("variance", self.pipeline.variance),
        ]

    def facts(self) -> dict[str, Any]:
        return {
            "latent_shape": list(self.latents.shape),
            "vae": self.vae,
            "contract": asdict(self.contract),
            **({"autoencoder_data": self.autoencoder_data} if self.autoencoder_data else {}),
            "chain_sha256": self.pipeline.chain_sha256,
            "loss": self.module.objective.loss,
            "prediction": self.pipeline.prediction,
            "variance": self.pipeline.variance,
        }

    def finish(self, run: Run) -> tuple[dict[str, Any], Path]:
        self.pipeline.network.eval().float()
        with atomic_folder(run.pipeline_folder) as partial:
            self.pipeline.save(partial)
        images, captions = self.module.sample_grid()
        path = run.images / "samples_final.png"
        grid(images, captions if any(captions) else None, columns=4).save(path)
        return {}, path

    def next_command(self, run: Run) -> str:
        _, captions = self.module.grid_conditions
        options = {"text": [f"prompt={' '.join(str(captions[0]).split())}"], "class": ["label=0"]}
        return shell.tool_command("sample", f"run={run.path}", *options.get(self.pipeline.conditioning.kind, []))


def _check_init_from(
    source: LatentDiffusion,
    autoencoder: Autoencoder,
    conditioning: Conditioning,
    objective: Objective,
    schedule: NoiseSchedule,
    variance: str,
) -> None:
    """Check that the network from `init_from` can be fine-tuned with the options of this run.

    The autoencoder, conditioning, text encoder, prediction and chain must match, and Sigma must be learned in both
    or in neither. The classes can differ.

    Raises:
        UserError: One of these settings differs. The message gives both values.
    """
    old, old_vae, new_vae = source.conditioning, source.contract.autoencoder_sha256, autoencoder.weights_sha256()
    chains = source.schedule.alpha_bar, schedule.alpha_bar
    same_chain = len(chains[0]) == len(chains[1]) and torch.allclose(*chains, rtol=1e-9)  # betas are rounded
    same_outputs = (source.variance == "learned_range") == (variance == "learned_range")
    encoder, kinds, prediction = old.state().get("encoder"), (_choice(old), _choice(conditioning)), source.prediction
    for is_same, setting, old_value, new_value, remedy in (
        (old_vae == new_vae, "the autoencoder", old_vae[:12], new_vae[:12], "vae=<pipeline folder of init_from>/vae"),
        (kinds[0] == kinds[1], "the conditioning", *kinds, f"conditioning={kinds[0]}"),
        (
            *(old.has_same_encoder(conditioning), "the text encoder"),
            *(_describe_encoder(old), _describe_encoder(conditioning), f"conditioning.encoder={encoder}"),
        ),
        (
            *(prediction == objective.prediction, "the prediction"),
            *(prediction, objective.prediction, f"objective.prediction={prediction}"),
        ),
        (same_outputs, "the variance", source.variance, variance, f"variance={source.variance}"),
        (same_chain, "the schedule", source.schedule.name, schedule.name, "the same schedule= options"),
    ):
        if not is_same:
            message = (
                f"The network from init_from= was trained with {setting} {old_value}, but this run uses {new_value}."
            )
            raise UserError(f"{message} Use {remedy}.")


def _choice(conditioning: Conditioning) -> str:
    """Return the value of conditioning= for a conditioning."""
    is_clip_sd = isinstance(conditioning, TextCondition) and not conditioning.encoder.masked
    return "clip_sd" if is_clip_sd else conditioning.kind


def _describe_encoder(conditioning: Conditioning) -> str:
    state = conditioning.state()
    return f"{state.get('encoder')} ({str(state.get('encoder_sha256'))[:12]})"
