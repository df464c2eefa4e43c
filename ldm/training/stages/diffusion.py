"""Stage 2 as the front door runs it: latents, conditions and a network become a pipeline that is trained."""

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
from ldm.data.order import draws_of_epoch
from ldm.diffusion.objective import Objective
from ldm.diffusion.samplers.base import SamplerLike
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.files.atomic import durable_folder
from ldm.image_grid import grid
from ldm.latents.captions import open_captions
from ldm.latents.statistics import StatisticsType, encode_latents, published
from ldm.networks.class_rows import ClassChange, with_classes
from ldm.networks.conditioning import Conditioning
from ldm.rules import Depth, Number, Positive, Share, Size, Switch, Whole, apply_rules
from ldm.runs.load import load_autoencoder, load_pipeline
from ldm.runs.run import Run, data_of_autoencoder
from ldm.runtime import shell
from ldm.sampling.pipeline import LatentDiffusionPipeline
from ldm.training.modules.diffusion import BATCH, NUM_BANDS, DiffusionTraining
from ldm.training.optim.factory import OptimizerFactory
from ldm.training.stages.base import Stage


class NetworkSizes(TypedDict, total=False):
    """What a network is made of, by the names that one or the other has for it."""

    patch_size: Size
    hidden_dim: Size
    depth: Depth
    head_dim: Size
    mlp_ratio: Annotated[Positive, Field(le=1000)]
    cross_attention_every: Annotated[Whole, Field(ge=0)]
    block_out_channels: list[Size]
    layers_per_block: Depth
    attention_levels: list[Annotated[Whole, Field(ge=0)]]
    norm_num_groups: Size


class DiffusionStage(Stage):
    """Stage 2 as the front door runs it.

    Args:
        network: Makes the network from sample_size, in_channels, out_channels and the conditioning's options.
        variance: Sigma of the reverse chain; None: learned_range where the objective trains it, else fixed_small.
        conditioning: Makes the conditioning from the images.
        sampler: For the grids while training.
        device: Where the images are encoded.
        prompts: Captions of the sample grid; [] takes the first validation captions.
        latent_statistics: What latents are standardised by.
        find_autoencoder: data_fingerprint -> the first stage and where it came from.
        init_from: A run or pipeline folder to continue from, instead of a fresh `network`.
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
        drop_condition: Share,
        sampler: SamplerLike,
        guidance: Number,
        prompts: list[str],
        optimizer: Callable[..., torch.optim.Optimizer],
        images: ImageData,
        flip: Switch,
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
        made = conditioning(images)
        continued = None if init_from is None else load_pipeline(init_from)
        autoencoder, self.vae = find_autoencoder(data_fingerprint=images.fingerprint)
        self.autoencoder_data = data_of_autoencoder(self.vae, autoencoder)
        autoencoder.to(device)
        standard = published(autoencoder, latent_statistics)
        if continued is not None:
            _check_continued(continued, autoencoder, made, objective, schedule, sigma)
            known = continued.autoencoder.statistics
            assert known is not None
            standard = known.latent_mean, known.latent_std  # with the meaning that the network was trained with
        self.contract, self.latents = encode_latents(autoencoder, images, flip, cache_dir, standard=standard)
        self.condition_of = made.lookup(images, partial(open_captions, cache_dir=cache_dir))
        self.pipeline = LatentDiffusionPipeline(
            network=self._network(network, made, sigma) if continued is None else self._continue(continued, made),
            autoencoder=autoencoder,
            schedule=schedule,
            prediction=objective.prediction,
            conditioning=made,
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
            shown=made.examples(images, prompts),
            sampler=sampler,
            guidance=guidance,
            pictures=folder / "images",
        )

    def _network(self, network: Callable[..., nn.Module], conditioning: Conditioning, variance: str) -> nn.Module:
        """A fresh network for the latents."""
        channels, side, _ = self.latents.shape
        outputs = 2 * channels if variance == "learned_range" else channels
        options = conditioning.network_options()
        try:
            return network(sample_size=side, in_channels=channels, out_channels=outputs, **options).train()
        except ValueError as error:
            raise UserError(f"This network does not fit latents of {channels} x {side} x {side}: {error}.") from error

    def _continue(self, continued: LatentDiffusionPipeline, conditioning: Conditioning) -> nn.Module:
        """The network of `init_from`, for the classes of these images."""
        network, old, new = continued.network, continued.conditioning.class_names, conditioning.class_names
        if old is not None and new is not None:
            network = with_classes(network, old, new)
            self.class_change = ClassChange.between(old, new)
        return network.requires_grad_(True).train()

    @classmethod
    def check(cls, resolution: int, **options: Any) -> None:
        network, conditioning = options["network"], options["conditioning"]
        apply_rules(cls, options)
        apply_rules(NetworkSizes, network.keywords)
        apply_rules(conditioning.func, conditioning.keywords)
        try:
            with torch.device("meta"):
                network(sample_size=resolution, in_channels=1, out_channels=1)
        except ValueError as error:
            raise UserError(f"No network can be made of the options network.*: {error}.") from error
        if options["latent_statistics"] != "measured" and options["init_from"] is not None:
            raise UserError(
                "init_from= keeps the statistics that its network was trained with: leave latent_statistics= out."
            )
        schedule, objective = options["schedule"], options["objective"]
        variance = objective.variance(options["variance"])
        try:
            objective.check(variance, schedule.alpha_bar)
            options["sampler"].check(schedule)
            asked = options["sampler"].variance
            if asked == "optimal" or (asked == "learned_range" and variance != "learned_range"):
                raise ValueError(f"sampler.variance={asked} is none of this network, which is trained for {variance}")
            if schedule.num_steps < NUM_BANDS:
                raise ValueError(f"a chain needs {NUM_BANDS} steps at least; got {schedule.num_steps}")
        except ValueError as error:
            raise UserError(f"objective=, variance=, schedule= and sampler= do not go together: {error}.") from error
        if (vae := options["find_autoencoder"].keywords["vae"]) is not None:
            load_autoencoder(vae).latent_shape(resolution)

    def fetch(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> BATCH:
        views = [self.latents.batch(indices, view) for view in range(self.latents.moments.shape[1])]
        draws = None
        if epochs is not None:
            of_epoch = {e: draws_of_epoch(len(self.images), self.seed, e).numpy() for e in set(epochs.tolist())}
            draws = np.array([of_epoch[e][i] for e, i in zip(epochs.tolist(), indices.tolist(), strict=True)])
        return {
            "mean": torch.stack([mean for mean, _ in views], dim=1),
            "log_variance": torch.stack([log_variance for _, log_variance in views], dim=1),
            "condition": self.condition_of(indices, draws),
        }

    def rows(self) -> list[tuple[str, str]]:
        network = self.pipeline.network
        parameters = sum(p.numel() for p in network.parameters())
        channels, height, width = self.latents.shape
        patch = getattr(network.config, "patch_size", 1)
        warnings = []
        if self.autoencoder_data is not None and self.autoencoder_data["fingerprint"] != self.images.fingerprint:
            here = f"{self.images.name} {self.images.fingerprint[:8]}"
            other = f"the autoencoder was trained on other data: {self.autoencoder_data['description']}"
            warnings.append(("warning", f"{other}, while this run trains on {here}"))
        return [
            ("autoencoder", self.vae),
            *warnings,
            ("model", f"{type(network).__name__}, {parameters / 1e6:.1f} M parameters"),
            ("latent", f"{channels} x {height} x {width} from {self.contract.resolution} px"),
            ("tokens", f"{height * width // patch**2} of {patch} x {patch}"),
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
        with durable_folder(run.pipeline_folder) as partial:
            self.pipeline.save(partial)
        images, captions = self.module.draw()
        path = run.images / "samples_final.png"
        grid(images, captions if any(captions) else None, columns=4).save(path)
        return {}, path

    def next_command(self, run: Run) -> str:
        _, captions = self.module.shown
        options = {"text": [f"prompt={' '.join(str(captions[0]).split())}"], "class": ["label=0"]}
        return shell.tool_command("sample", f"run={run.path}", *options.get(self.pipeline.conditioning.kind, []))


def _check_continued(
    continued: LatentDiffusionPipeline,
    autoencoder: Autoencoder,
    conditioning: Conditioning,
    objective: Objective,
    schedule: NoiseSchedule,
    variance: str,
) -> None:
    """A network goes on on its latents and its kind of condition, with what it predicts, its chain, and a learned Sigma
    or none; on other classes too.

    Raises:
        UserError: naming both sides.
    """
    known, was, here = continued.conditioning, continued.contract.autoencoder_sha256, autoencoder.weights_sha256()
    same_chain = torch.equal(continued.schedule.alpha_bar, schedule.alpha_bar)
    same_outputs = (continued.variance == "learned_range") == (variance == "learned_range")
    encoder, kind, prediction = known.state().get("encoder"), known.kind, continued.prediction
    for is_same, what, before, now, remedy in (
        (was == here, "latents of the autoencoder", was[:12], here[:12], "vae=<the folder of its pipeline>/vae"),
        (kind == conditioning.kind, "the condition", kind, conditioning.kind, f"conditioning={kind}"),
        (
            *(known.is_same_encoder(conditioning), "captions through the text encoder"),
            *(_encoder(known), _encoder(conditioning), f"conditioning.encoder={encoder}"),
        ),
        (
            *(prediction == objective.prediction, "the prediction"),
            *(prediction, objective.prediction, f"objective.prediction={prediction}"),
        ),
        (same_outputs, "the variance", continued.variance, variance, f"variance={continued.variance}"),
        (same_chain, "the schedule", continued.schedule.name, schedule.name, "the same schedule="),
    ):
        if not is_same:
            raise UserError(f"init_from was trained on {what} {before}, and this run uses {now}. Choose {remedy}.")


def _encoder(conditioning: Conditioning) -> str:
    state = conditioning.state()
    return f"{state.get('encoder')} ({str(state.get('encoder_sha256'))[:12]})"
