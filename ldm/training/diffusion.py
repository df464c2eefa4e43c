"""Stage 2: a denoising diffusion model on the latents of stage 1 (Algorithm 1 of Ho et al. 2020, arXiv:2006.11239)."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.data.captions import CaptionData, open_captions
from ldm.data.images import ImageData
from ldm.data.order import derive_seed
from ldm.diffusion.chain import check_prediction, marginal
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.loss import DISTRIBUTIONS, WEIGHTINGS, sample_timesteps, simple_loss
from ldm.diffusion.sampler import Sampler, timesteps
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.networks.conditioning import (
    ClassCondition,
    Condition,
    Conditioning,
    NoCondition,
    TextCondition,
    drop,
)
from ldm.pictures import grid, to_pil
from ldm.pipeline import LatentDiffusionPipeline, sample_generators
from ldm.run import Run, load_pipeline
from ldm.training.callbacks import save_grid
from ldm.training.module import TrainingModule
from ldm.training.stage import OptimizerFactory, Outcome, Stage
from ldm.training.vae import encode_latents

NUM_BANDS = 4
BATCH = dict[str, Any]


@dataclass(frozen=True)
class Objective:
    """What the network predicts and how its error is weighted.

    Args:
        prediction: eps, z_0, v or flow.
        weighting: simple (1 in the prediction's own space) or min_snr (arXiv:2303.09556, with `gamma`).
        timesteps: How t is drawn while training: uniform or logit_normal.
    """

    prediction: str = "v"
    weighting: str = "simple"
    timesteps: str = "uniform"
    gamma: float = 5.0

    def __post_init__(self) -> None:
        for option, value, known in (
            ("weighting", self.weighting, WEIGHTINGS),
            ("timesteps", self.timesteps, DISTRIBUTIONS),
        ):
            if value not in known:
                raise ValueError(f"objective.{option}={value} is unknown. Choose one of: {', '.join(known)}.")


class DiffusionTraining(TrainingModule):
    """Trains a network to denoise z_t; a batch holds moments [b, views, C, h, w] and a condition.

    Args:
        pipeline: The parts, with the network to train.
        objective: The loss.
        optimizer: Builds the optimizer.
        drop_condition: Share of conditions replaced by the null one, for classifier-free guidance.
        seed: Noise, timesteps and drops of batch k depend on seed and k alone.
        shown: Conditions and captions of the sample grid.
        sampler, guidance: How the grid is drawn.
    """

    def __init__(
        self,
        pipeline: LatentDiffusionPipeline,
        objective: Objective,
        optimizer: OptimizerFactory,
        *,
        drop_condition: float,
        seed: int,
        shown: tuple[Condition, list[str | None]],
        sampler: Sampler,
        guidance: float,
        pictures: Path,
    ) -> None:
        super().__init__(pipeline.network, optimizer, seed)
        self.pipeline, self.objective, self.drop_condition = pipeline, objective, drop_condition
        self.shown, self.sampler, self.guidance, self.pictures = shown, sampler, guidance, pictures
        self.null = pipeline.conditioning.null()

    @property
    def schedule(self) -> NoiseSchedule:
        return self.pipeline.schedule

    def _denoiser(self) -> Denoiser:
        return self.pipeline.denoiser()

    def _loss(self, z_0: Tensor, t: Tensor, condition: Condition, generator: torch.Generator) -> Tensor:
        """Loss per sample, [b]."""
        eps = torch.randn(z_0.shape, generator=generator, device=z_0.device)
        output, _ = self._denoiser().output(marginal(self.schedule, z_0, t, eps), t, condition)
        objective = self.objective
        return simple_loss(
            self.schedule,
            output,
            z_0,
            eps,
            t,
            objective.prediction,
            weighting=objective.weighting,
            gamma=objective.gamma,
        )

    def training_step(self, batch: BATCH, batch_idx: int) -> dict[str, Tensor]:
        mean, log_variance, condition = batch["mean"], batch["log_variance"], batch["condition"]
        size, device = len(mean), mean.device
        generator = self.next_generator()
        view = torch.randint(mean.shape[1], (size,), generator=generator, device=device)
        rows = torch.arange(size, device=device)
        mean, log_variance = mean[rows, view], log_variance[rows, view]
        noise = torch.randn(mean.shape, generator=generator, device=device)
        z_0 = self.pipeline.autoencoder.standardise(mean + (0.5 * log_variance).exp() * noise)
        t = sample_timesteps(self.schedule.num_steps, size, self.objective.timesteps, generator, device)
        if condition:
            dropped = torch.rand(size, generator=generator, device=device) < self.drop_condition
            condition = drop(condition, self.null, dropped)
        loss = self._loss(z_0, t, condition, generator).mean()
        if self.logs_now:
            self.log("train/loss", loss.detach())
        return {"loss": loss}

    def validation_step(self, batch: BATCH, batch_idx: int) -> None:
        """Loss per band of t on the posterior means, with noise that is the same every time."""
        z_0 = self.pipeline.autoencoder.standardise(batch["mean"][:, 0])
        size, steps = len(z_0), self.schedule.num_steps
        generator = torch.Generator(device=z_0.device).manual_seed(derive_seed(0, batch_idx))
        losses = []
        for band in range(NUM_BANDS):
            low, high = steps * band // NUM_BANDS, steps * (band + 1) // NUM_BANDS
            t = torch.randint(low + 1, high + 1, (size,), generator=generator, device=z_0.device)
            losses.append(self._loss(z_0, t, batch["condition"], generator).mean())
            name = f"val/loss_t{low + 1}_to_{high}"
            self.log(name, losses[-1], batch_size=size, sync_dist=True)
        self.log("val/loss", torch.stack(losses).mean(), batch_size=size, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Draw the sample grid while the averaged weights are still in place."""
        if not self.trainer.sanity_checking and self.trainer.is_global_zero:
            images, captions = self.draw()
            picture = grid(images, captions if any(captions) else None, columns=4)
            save_grid(self, self.pictures, "samples", picture, images, captions)

    def draw(self) -> tuple[list[Any], list[str | None]]:
        """The sample grid's pictures and captions; the noise is the same every time."""
        condition, captions = self.shown
        was_training = self.trained.training
        generators = sample_generators(0, range(len(captions)))
        z = self.pipeline.sample(self.sampler, condition, generators, guidance=self.guidance)
        self.trained.train(was_training)
        return to_pil(self.pipeline.decode(z)), captions


class DiffusionStage(Stage):
    """Stage 2 as the front door runs it.

    Args:
        network: Makes the network from sample_size, in_channels, out_channels and the conditioning's options.
        conditioning: Makes the conditioning from the images.
        sampler: For the grids while training.
        device: Where the images are encoded.
        prompts: Captions of the sample grid; [] takes the first validation captions.
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
        conditioning: Callable[[ImageData], Conditioning],
        drop_condition: float,
        sampler: Sampler,
        guidance: float,
        prompts: list[str],
        optimizer: Callable[..., torch.optim.Optimizer],
        images: ImageData,
        flip: bool,
        cache_dir: str | None,
        seed: int,
        folder: Path,
        device: torch.device,
        find_autoencoder: Callable[..., tuple[Autoencoder, str]],
        init_from: str | None = None,
    ) -> None:
        self.images = images
        try:
            check_prediction(objective.prediction, schedule.alpha_bar)
            timesteps(schedule.num_steps, sampler.steps, sampler.spacing)
        except ValueError as error:
            raise UserError(f"schedule=, objective= and sampler= do not go together: {error}.") from error
        made = conditioning(images)
        continued = None if init_from is None else load_pipeline(init_from)
        autoencoder, self.vae = find_autoencoder(data_fingerprint=images.fingerprint)
        autoencoder.to(device)
        if continued is not None:
            # standardised latents keep the meaning that the network was trained with
            _check_continued(continued, autoencoder, made)
            same_chain = torch.equal(continued.schedule.alpha_bar, schedule.alpha_bar)
            if continued.prediction != objective.prediction or not same_chain:
                raise UserError(
                    f"init_from predicts {continued.prediction} on the schedule {continued.schedule.name}, this run "
                    f"{objective.prediction} on {schedule.name}. Choose the same objective= and schedule=."
                )
            autoencoder.statistics = continued.autoencoder.statistics
        self.contract, self.latents = encode_latents(autoencoder, images, flip, cache_dir)
        self.captions: CaptionData | None = None
        self.labels: Tensor | None = None
        if isinstance(made, TextCondition):
            self.captions = open_captions(made.encode, images.require_captions(), made.state(), cache_dir=cache_dir)
        elif isinstance(made, ClassCondition):
            self.labels = torch.tensor(images.require_labels())
        channels, side, _ = self.latents.shape
        if continued is not None:
            model = continued.network.requires_grad_(True)
        else:
            try:
                model = network(sample_size=side, in_channels=channels, out_channels=channels, **made.network_options())
            except ValueError as error:
                raise UserError(
                    f"This network does not fit latents of {channels} x {side} x {side}: {error}"
                ) from error
        self.pipeline = LatentDiffusionPipeline(
            network=model.train(),
            autoencoder=autoencoder,
            schedule=schedule,
            prediction=objective.prediction,
            conditioning=made,
            contract=self.contract,
            latent_shape=self.latents.shape,
        )
        self.module = DiffusionTraining(
            self.pipeline,
            objective,
            OptimizerFactory(optimizer),
            drop_condition=drop_condition,
            seed=seed,
            shown=self._shown(made, prompts),
            sampler=sampler,
            guidance=guidance,
            pictures=folder / "images",
        )

    def _shown(self, conditioning: Conditioning, prompts: list[str]) -> tuple[Condition, list[str | None]]:
        if isinstance(conditioning, TextCondition):
            captions = list(prompts) or [self.images.require_captions()[i] for i in self.images.val_indices[:16]]
            return conditioning.encode(captions), list(captions)
        if isinstance(conditioning, ClassCondition):
            labels = [i % len(conditioning.class_names) for i in range(16)]
            return conditioning.encode(labels), [conditioning.class_names[label] for label in labels]
        return {}, [None] * 16

    def fetch(self, indices: np.ndarray) -> BATCH:
        views = [self.latents.batch(indices, view) for view in range(self.latents.moments.shape[1])]
        condition: Condition = {}
        if self.captions is not None:
            condition = self.captions.batch(indices)
        elif self.labels is not None:
            condition = {"label": self.labels[torch.from_numpy(indices)]}
        return {
            "mean": torch.stack([mean for mean, _ in views], dim=1),
            "log_variance": torch.stack([log_variance for _, log_variance in views], dim=1),
            "condition": condition,
        }

    def rows(self) -> list[tuple[str, str]]:
        network = self.pipeline.network
        parameters = sum(p.numel() for p in network.parameters())
        channels, height, width = self.latents.shape
        patch = getattr(network.config, "patch_size", 1)
        return [
            ("autoencoder", self.vae),
            ("model", f"{type(network).__name__}, {parameters / 1e6:.1f} M parameters"),
            ("latent", f"{channels} x {height} x {width} from {self.contract.resolution} px"),
            ("tokens", f"{height * width // patch**2} of {patch} x {patch}"),
            ("conditioning", self.pipeline.conditioning.kind),
            ("chain", f"{self.pipeline.schedule.name}, T = {self.pipeline.schedule.num_steps}"),
            ("prediction", self.pipeline.prediction),
        ]

    def facts(self) -> dict[str, Any]:
        return {"latent_shape": list(self.latents.shape), "vae": self.vae, "contract": asdict(self.contract)}

    def finish(self, run: Run) -> Outcome:
        self.pipeline.network.eval().float()
        self.pipeline.save(run.path / "pipeline")
        images, captions = self.module.draw()
        path = run.images / "samples_final.png"
        grid(images, captions if any(captions) else None, columns=4).save(path)
        option = {"text": ' prompt="red heart"', "class": " label=0"}.get(self.pipeline.conditioning.kind, "")
        return Outcome(pictures=[str(path)], next_command=f"python tools/sample.py run={run.path}{option}")


def _check_continued(continued: LatentDiffusionPipeline, autoencoder: Autoencoder, conditioning: Conditioning) -> None:
    """A pipeline can be continued on the same latents and the same kind of condition only.

    Raises:
        UserError: another autoencoder, or another condition.
    """
    here, there = autoencoder.weights_sha256(), continued.contract.autoencoder_sha256
    if here != there:
        raise UserError(
            f"init_from was trained on latents of the autoencoder {there[:12]}, but vae= gives {here[:12]}. "
            "Name the one that it was trained with: vae=<its folder>/vae."
        )
    theirs, ours = continued.conditioning.network_options(), conditioning.network_options()
    if theirs != ours:
        raise UserError(
            f"init_from is conditioned on {continued.conditioning.kind} {theirs}, this run on "
            f"{conditioning.kind} {ours}. Choose conditioning={continued.conditioning.kind} and the same encoder."
        )


def no_condition(images: ImageData) -> NoCondition:
    """conditioning=none."""
    return NoCondition()


def class_condition(images: ImageData) -> ClassCondition:
    """conditioning=class; the images must carry labels."""
    labels = images.require_labels()
    names = images.class_names or [str(label) for label in range(max(labels) + 1)]
    return ClassCondition(names)


def text_condition(images: ImageData, encoder: str, max_tokens: int) -> TextCondition:
    """conditioning=text; the images must carry captions."""
    images.require_captions()
    return TextCondition(encoder, max_tokens)
