"""Stage 1 as the front door runs it, and the latents that it leaves for stage 2."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ldm.autoencoder.autoencoder import Autoencoder, TrainType, choose_trained
from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.patch import PatchAutoencoder
from ldm.autoencoder.perceptual import Perceptual
from ldm.autoencoder.point_posterior import pin_posterior
from ldm.autoencoder.regularisers import Regulariser
from ldm.data.images import ImageData
from ldm.errors import UserError
from ldm.files.atomic import durable_folder
from ldm.image_grid import rows, to_pil
from ldm.latents.statistics import StatisticsType, encode_latents, published
from ldm.metrics.image import patch_components, project, psnr, ssim
from ldm.rules import Depth, Size, Switch, apply_rules
from ldm.runs.load import load_autoencoder
from ldm.runs.run import RUN_FILE, Run
from ldm.runtime.random import numpy_generator
from ldm.training.modules.adversary import Adversary
from ldm.training.modules.autoencoder import VAETraining
from ldm.training.optim.factory import OptimizerFactory
from ldm.training.stages.base import Stage

START_IMAGES, START_PIXELS = 4096, 4096 * 64 * 64
"""At most so many training images, and pixels of them, start the shortcut and the codebook and fit PCA."""
HELD_OUT_PIXELS = 2**20
"""Pixels of a batch while held-out images are measured: 64 images at 128 px."""


class ModelSizes(TypedDict, total=False):
    """What a model is made of, by the names that diffusers and ours have for it."""

    patch: Size
    latent_channels: Size
    block_out_channels: list[Size]
    layers_per_block: Depth
    norm_num_groups: Size


class VAEStage(Stage):
    """Stage 1 as the front door runs it.

    Args:
        model: A diffusers KL autoencoder, or ours around it; None with `pretrained`.
        pretrained: A run, diffusers folder or hub id whose autoencoder to take instead.
        train: Which of its weights to train: all, those of the decoder, or nothing.
        loss: Its loss.
        perceptual: A distance in features, added to the loss.
        adversarial: Makes the discriminator's side.
        regulariser: What the latents are held to.
        optimizer: parameter groups -> optimizer.
        latent_statistics: What latents are standardised by.
        init_from: A run, diffusers folder or hub id whose weights to start from, instead of a fresh `model`.
    """

    kind = "vae"

    def __init__(
        self,
        *,
        model: Callable[..., nn.Module] | None,
        loss: AutoencoderLoss,
        optimizer: Callable[..., torch.optim.Optimizer],
        regulariser: Regulariser,
        images: ImageData,
        flip: Switch,
        cache_dir: str | None,
        seed: int,
        folder: Path,
        device: torch.device,
        perceptual: Perceptual | None = None,
        adversarial: Callable[[], Adversary] | None = None,
        pretrained: str | None = None,
        train: Annotated[TrainType, Field()] = "all",
        latent_statistics: Annotated[StatisticsType, Field()] = "measured",
        init_from: str | None = None,
    ) -> None:
        self.images, self.flip, self.cache_dir = images, flip, cache_dir
        self.latent_statistics, self.trains = latent_statistics, train != "nothing"
        source = pretrained or init_from
        if source is not None:
            self.autoencoder = load_autoencoder(source)
            network = self.autoencoder.model
            if regulariser.name == "none" and train == "all":
                pin_posterior(network)
        else:
            assert model is not None
            network = regulariser.build(model, images.resolution)
            self.autoencoder = Autoencoder(network)
            self._start(network, regulariser, seed, device)
        choose_trained(network, train)
        network.train(self.trains)
        self.latent_shape = self.autoencoder.latent_shape(images.resolution)
        self.pretrained, self.trained, self.regulariser, loss.perceptual = pretrained, train, regulariser, perceptual
        self.perceptual_features = _features_of(source) | ({perceptual.name} if perceptual is not None else set())
        self.module = VAETraining(
            network,
            loss,
            regulariser,
            OptimizerFactory(optimizer),
            seed=seed,
            flip=flip,
            pictures=folder / "images",
            adversary=adversarial() if adversarial is not None else None,
        )

    def _start(self, network: nn.Module, regulariser: Regulariser, seed: int, device: torch.device) -> None:
        if isinstance(network, PatchAutoencoder) and network.config.shortcut:
            try:
                network.init_shortcut(self._first_images(seed))
            except ValueError as error:
                raise UserError(f"This autoencoder does not fit: {error}") from error
        regulariser.start(network, lambda: self._first_images(seed), seed, device)

    def _first_images(self, seed: int) -> Tensor:
        count = min(START_IMAGES, START_PIXELS // self.images.resolution**2)
        chosen = numpy_generator(seed).permutation(self.images.train_indices)[: max(1, count)]
        return self.images.batch(np.sort(chosen))

    @classmethod
    def check(cls, resolution: int, **options: Any) -> None:
        pretrained, init_from, part = options["pretrained"], options["init_from"], options["train"]
        statistics, regulariser = options["latent_statistics"], options["regulariser"]
        apply_rules(cls, options)
        if options["model"] is not None:
            apply_rules(ModelSizes, options["model"].keywords)
        if pretrained is not None and init_from is not None:
            raise UserError("autoencoder.path= and init_from= both name weights to start from: give one of them.")
        if part == "nothing" and (options["perceptual"] is not None or options["adversarial"] is not None):
            raise UserError(
                "perceptual= and adversarial= are losses of a training, and autoencoder.train=nothing trains none: "
                "choose autoencoder.train=decoder or all, or leave them out."
            )
        if options["adversarial"] is not None:
            options["adversarial"]().check(resolution)
        if (source := pretrained or init_from) is not None:
            autoencoder = load_autoencoder(source)
            autoencoder.latent_shape(resolution)
            if part != "nothing":
                regulariser.check(autoencoder.model)
            published(autoencoder, statistics)
            return
        if statistics == "published":
            raise UserError(
                "latent_statistics=published goes with a pretrained autoencoder: a new one has published nothing. "
                "Leave it at measured, or choose autoencoder=pretrained."
            )
        with torch.device("meta"):
            Autoencoder(regulariser.build(options["model"], resolution)).latent_shape(resolution)

    def compile(self) -> None:
        core = getattr(self.module.trained, "core", self.module.trained)
        core.encoder.compile()
        core.decoder.compile()

    def fetch(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> Tensor:
        return self.images.batch(indices)

    @property
    def compression(self) -> float:
        """Pixel values per latent value."""
        return 3 * self.images.resolution**2 / math.prod(self.latent_shape)

    def rows(self) -> list[tuple[str, str]]:
        channels, height, width = self.latent_shape
        weights = list(self.module.trained.parameters())
        size, trained = sum(p.numel() for p in weights), sum(p.numel() for p in weights if p.requires_grad)
        part = f"{trained / 1e6:.1f} M" if trained else "none"
        counts = f"{size / 1e6:.1f} M parameters" + ("" if trained == size else f", {part} of them trained")
        factor, values = self.autoencoder.factor, math.prod(self.latent_shape)
        kind = self.autoencoder.regulariser
        if (codes := self.autoencoder.codebook_size) is not None:
            kind = f"vq, {codes} codes = {math.log2(codes):.3g} bits per location"
        return [
            ("model", f"{type(self.module.trained).__name__}, {counts}"),
            ("latent", f"{channels} x {height} x {width} = {values} values, f = {factor}"),
            ("compression", f"{self.compression:.1f} pixel values per latent value"),
            ("regulariser", kind),
            *([("loss", self._describe_loss())] if self.trains else []),
        ]

    def _describe_loss(self) -> str:
        loss, adversary = self.module.loss, self.module.adversary
        terms = [f"{weight:g} {name}" for name in ("l1", "mse", "nll") if (weight := getattr(loss, name))]
        if loss.perceptual is not None:
            terms.append(f"{loss.perceptual.weight:g} perceptual ({loss.perceptual.name})")
        if adversary is not None:
            share = f"{adversary.start:.0%} of the budget" if adversary.start < 1 else f"step {adversary.start:g}"
            terms.append(f"{adversary.weight:g} adversarial ({adversary.game}, from {share} on)")
        return " + ".join(terms)

    def facts(self) -> dict[str, Any]:
        loss, adversary = self.module.loss, self.module.adversary
        return {
            "latent_shape": list(self.latent_shape),
            "factor": self.autoencoder.factor,
            "pretrained": self.pretrained,
            "trained": self.trained,
            "regulariser": self.autoencoder.regulariser,
            "codebook_size": self.autoencoder.codebook_size,
            "likelihood": bool(loss.nll),
            "perceptual": "none" if loss.perceptual is None else loss.perceptual.name,
            "perceptual_features": sorted(self.perceptual_features),
            "adversarial": "none" if adversary is None else adversary.game,
            "discriminator": None if adversary is None else adversary.shape,
            "latent_statistics": self.latent_statistics,
        }

    def finish(self, run: Run) -> tuple[dict[str, Any], Path]:
        self.module.trained.eval().float()
        standard = published(self.autoencoder, self.latent_statistics)
        contract, latents = encode_latents(self.autoencoder, self.images, self.flip, self.cache_dir, standard=standard)
        del latents
        if self.trained == "all":
            self.autoencoder.publish()
        with durable_folder(run.autoencoder_folder) as partial:
            self.autoencoder.save(partial)
        contract.save(run.path)
        return self._held_out(run)

    def next_command(self, run: Run) -> str:
        return run.next_training()

    def _held_out(self, run: Run) -> tuple[dict[str, Any], Path]:
        """PSNR and SSIM of the validation images next to a PCA of the same size, and a figure of both.

        In batches whose memory does not depend on the resolution.
        """
        factor, channels = self.autoencoder.factor, self.autoencoder.channels
        batch_size = min(64, max(1, HELD_OUT_PIXELS // self.images.resolution**2))

        def batches(indices: np.ndarray) -> Iterator[Tensor]:
            for start in range(0, len(indices), batch_size):
                yield self.images.batch(indices[start : start + batch_size])

        components = patch_components(batches(np.sort(self.images.train_indices[:START_IMAGES])), factor)
        columns: dict[str, list[Any]] = {"original": [], "autoencoder": [], "PCA, same size": []}
        values: dict[str, list[Tensor]] = {"psnr_db": [], "pca_psnr_db": [], "ssim": []}
        for originals in batches(self.images.val_indices[:512]):
            reconstructed = self.autoencoder.decode(self.autoencoder.encode(originals)[0]).cpu()
            pca = project(components, originals, factor=factor, channels=channels)
            values["psnr_db"].append(psnr(originals, reconstructed))
            values["pca_psnr_db"].append(psnr(originals, pca))
            values["ssim"].append(ssim(originals, reconstructed))
            for column, images in zip(columns.values(), (originals, reconstructed, pca), strict=True):
                column += to_pil(images[: 10 - len(column)])
        figures: dict[str, Any] = {"val_images": min(512, len(self.images.val_indices))}
        figures |= {name: torch.cat(parts).mean().item() for name, parts in values.items()}
        figures["compression"] = self.compression
        path = run.images / "held_out_reconstructions.png"
        rows(list(columns.items())).save(path)
        return figures, path


def _features_of(source: str | None) -> set[str]:
    """The features that a run's loss was of, its predecessors' included: what says nothing about it any more."""
    if source is None or not (Path(source).expanduser() / RUN_FILE).is_file():
        return set()
    return set(Run.open(source).facts.get("perceptual_features", []))
