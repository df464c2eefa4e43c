"""Stage 1: builds and trains the autoencoder, and encodes the latents for stage 2."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ldm.autoencoder.autoencoder import Autoencoder, TrainablePart, published_statistics, set_trainable
from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.patch import PatchAutoencoder
from ldm.autoencoder.perceptual import Perceptual
from ldm.autoencoder.point_posterior import zero_posterior_noise
from ldm.autoencoder.regularisers import KL, Regulariser
from ldm.autoencoder.sampling_decoder import SamplingDecoder, sampling_decoder_of
from ldm.data.images import ImageData
from ldm.errors import InputError, UserError
from ldm.files.atomic import atomic_folder
from ldm.files.untrusted import first_line
from ldm.image_grid import labelled_rows, to_pil
from ldm.latents.statistics import StatisticsType, encode_latents, resolve_statistics
from ldm.metrics.image import MIN_SSIM_SIDE, patch_components, project, psnr, ssim
from ldm.rules import Depth, Flag, NonNegative, Number, Size, apply_rules
from ldm.runs.load import load_autoencoder
from ldm.runs.run import RUN_FILE, Run
from ldm.runtime.random import numpy_generator, torch_generator
from ldm.training.modules.adversary import Adversary
from ldm.training.modules.autoencoder import VAETraining
from ldm.training.optim.factory import OptimizerFactory
from ldm.training.stages.base import Stage

MAX_INIT_IMAGES, MAX_INIT_PIXELS = 4096, 4096 * 64 * 64
"""Maximum numbers of training images and pixels used to initialise the shortcut and the codebook. The PCA baseline also
uses at most this many images."""
MAX_LEVEL_IMAGES = 64
"""Maximum number of training images used to choose the level of the sampling decoder."""
PSNR_METRICS = {
    "psnr_db": "autoencoder",
    "pca_psnr_db": "PCA, same size",
    "sampling_decoder_psnr_db": "sampling decoder",
}
"""Name of the set of images whose PSNR is measured, keyed by metric."""
MAX_BATCH_PIXELS = 2**20
"""Maximum number of pixels in a batch of held-out images, for example 64 images of 128 x 128 pixels."""


class ModelSizes(TypedDict, total=False):
    """Rules for the sizes of autoencoders, both ours and those of diffusers, by argument name."""

    patch: Size
    latent_channels: Size
    block_out_channels: list[Size]
    layers_per_block: Depth
    norm_num_groups: Size


class VAEStage(Stage):
    """Stage 1: trains the autoencoder.

    Args:
        model: Builds an AutoencoderKL of diffusers or our wrapper around one. None if `pretrained` is given.
        loss: Reconstruction loss.
        optimizer: Builds the optimizer from parameter groups.
        regulariser: Regulariser of the latents.
        perceptual: Perceptual distance added to the loss.
        adversarial: Builds the discriminator and its optimizer.
        pretrained: Run, diffusers folder or Hub id of an autoencoder to use instead of a new one.
        train: Weights to train: "all", "decoder" or "nothing".
        decoder_noise: Scale of the noise levels used to train the sampling decoder; 0 for no sampling decoder.
        decoder_share: Fraction of the budget, at its end, spent on the sampling decoder.
        latent_statistics: Source of the statistics that standardise the latents.
        init_from: Run, diffusers folder or Hub id of an autoencoder from which training starts.
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
        flip: Flag,
        cache_dir: str | None,
        seed: int,
        folder: Path,
        device: torch.device,
        perceptual: Perceptual | None = None,
        adversarial: Callable[[], Adversary] | None = None,
        pretrained: str | None = None,
        train: Annotated[TrainablePart, Field()] = "all",
        decoder_noise: NonNegative = 0.0,
        decoder_share: Annotated[Number, Field(gt=0, lt=1)] = 0.7,
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
                zero_posterior_noise(network)
        else:
            assert model is not None
            network = regulariser.build(model, images.resolution)
            self.autoencoder = Autoencoder(network)
            self._initialise(network, regulariser, seed, device)
        decoder = sampling_decoder_of(network)
        if decoder_noise and decoder is None:
            scale = [1.0] * self.autoencoder.channels if source is None else _latent_scale(self.autoencoder)
            decoder = SamplingDecoder(network, scale)
        if not decoder_noise and train == "all":
            decoder = None  # the latents change, but it would not be trained on the new ones
        network.sampling_decoder = decoder
        set_trainable(network, train)
        if decoder is not None and not decoder_noise:
            decoder.requires_grad_(False)
        network.train(self.trains)
        self.latent_shape = self.autoencoder.latent_shape(images.resolution)
        self.pretrained, self.trained_part, self.regulariser = pretrained, train, regulariser
        loss.perceptual = perceptual
        self.perceptual_features = _perceptual_features(source) | (
            {perceptual.name} if perceptual is not None else set()
        )
        self.module = VAETraining(
            network,
            loss,
            regulariser,
            OptimizerFactory(optimizer),
            seed=seed,
            flip=flip,
            figures_dir=folder / "images",
            adversary=adversarial() if adversarial is not None else None,
            decoder_noise=decoder_noise,
            decoder_share=decoder_share,
        )

    def _initialise(self, network: nn.Module, regulariser: Regulariser, seed: int, device: torch.device) -> None:
        if isinstance(network, PatchAutoencoder) and network.config.shortcut:
            try:
                network.init_shortcut(self._sample_images(seed))
            except ValueError as error:
                raise UserError(f"The autoencoder cannot be initialised on these images: {error}") from error
        regulariser.initialise(network, lambda: self._sample_images(seed), seed, device)

    def _sample_images(self, seed: int) -> Tensor:
        count = min(MAX_INIT_IMAGES, MAX_INIT_PIXELS // self.images.resolution**2)
        indices = numpy_generator(seed).permutation(self.images.train_indices)[: max(1, count)]
        return self.images.batch(np.sort(indices))

    @classmethod
    def check(cls, resolution: int, **options: Any) -> None:
        pretrained, init_from, train = options["pretrained"], options["init_from"], options["train"]
        statistics, regulariser = options["latent_statistics"], options["regulariser"]
        apply_rules(cls, options)
        if resolution < MIN_SSIM_SIDE:
            rule = f"must be at least {MIN_SSIM_SIDE}, since SSIM compares windows of 11 x 11 pixels"
            raise InputError("resolution", resolution, rule)
        if options["model"] is not None:
            apply_rules(ModelSizes, options["model"].keywords)
        if pretrained is not None and init_from is not None:
            raise UserError("autoencoder.path= and init_from= both set the initial weights. Use only one of them.")
        if train == "nothing" and (options["perceptual"] is not None or options["adversarial"] is not None):
            raise UserError(
                "perceptual= and adversarial= have no effect with autoencoder.train=nothing. Use "
                "autoencoder.train=decoder or autoencoder.train=all, or remove these losses."
            )
        if (noise := options["decoder_noise"]) and (train == "nothing" or not isinstance(regulariser, KL)):
            rule = "must be 0 with autoencoder.train=nothing, or with a regulariser other than kl"
            raise InputError("decoder_noise", noise, rule)
        if options["adversarial"] is not None:
            options["adversarial"]().check(resolution)
        if (source := pretrained or init_from) is not None:
            autoencoder = load_autoencoder(source)
            autoencoder.latent_shape(resolution)
            if train != "nothing":
                regulariser.check(autoencoder.model)
            resolve_statistics(autoencoder, statistics)
            return
        if statistics == "published":
            raise UserError(
                "latent_statistics=published needs a pretrained autoencoder, because a new one has no published "
                "statistics. Use latent_statistics=measured or autoencoder=pretrained."
            )
        with torch.device("meta"):
            autoencoder = Autoencoder(regulariser.build(options["model"], resolution))
            autoencoder.latent_shape(resolution)
            try:
                autoencoder.encode(torch.zeros(1, 3, resolution, resolution))
            except (ValueError, RuntimeError) as error:  # for example, normalisation over a single value
                rule = f"is too small for this autoencoder: {first_line(error)}. Use a larger value"
                raise InputError("resolution", resolution, rule) from error

    def compile(self) -> None:
        network = self.module.trained
        core = getattr(network, "core", network)
        core.encoder.compile()
        core.decoder.compile()
        if (decoder := sampling_decoder_of(network)) is not None:
            getattr(decoder.decoder, "core", decoder.decoder).decoder.compile()

    def fetch(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> Tensor:
        return self.images.batch(indices)

    @property
    def compression(self) -> float:
        """Pixel values per latent value."""
        return 3 * self.images.resolution**2 / math.prod(self.latent_shape)

    def summary_rows(self) -> list[tuple[str, str]]:
        channels, height, width = self.latent_shape
        weights = list(self.module.trained.parameters())
        total, trainable = sum(p.numel() for p in weights), sum(p.numel() for p in weights if p.requires_grad)
        trainable_text = f"{trainable / 1e6:.1f} M" if trainable else "none"
        counts = f"{total / 1e6:.1f} M parameters" + ("" if trainable == total else f" ({trainable_text} trainable)")
        factor, num_values = self.autoencoder.factor, math.prod(self.latent_shape)
        regulariser, share = self.autoencoder.regulariser, 1 - self.module.second_phase_at
        if (codes := self.autoencoder.codebook_size) is not None:
            regulariser = f"vq, {codes} codes = {math.log2(codes):.3g} bits per location"
        return [
            ("model", f"{type(self.module.trained).__name__}, {counts}"),
            ("latent", f"{channels} x {height} x {width} = {num_values} values, f = {factor}"),
            ("compression", f"{self.compression:.1f} pixel values per latent value"),
            ("regulariser", regulariser),
            *([("loss", self._describe_loss())] if self.trains else []),
            *([("sampling decoder", f"trained in the last {share:.0%} of the budget")] if share else []),
        ]

    def _describe_loss(self) -> str:
        loss, adversary = self.module.loss, self.module.adversary
        terms = [f"{weight:g} {name}" for name in ("l1", "mse", "nll") if (weight := getattr(loss, name))]
        if loss.perceptual is not None:
            terms.append(f"{loss.perceptual.weight:g} perceptual ({loss.perceptual.name})")
        if adversary is not None:
            start = f"{adversary.start:.0%} of the budget" if adversary.start < 1 else f"step {adversary.start:g}"
            terms.append(f"{adversary.weight:g} adversarial ({adversary.gan_loss}, starting at {start})")
        return " + ".join(terms)

    def facts(self) -> dict[str, Any]:
        loss, adversary = self.module.loss, self.module.adversary
        return {
            "latent_shape": list(self.latent_shape),
            "factor": self.autoencoder.factor,
            "pretrained": self.pretrained,
            "trained": self.trained_part,
            "regulariser": self.autoencoder.regulariser,
            "codebook_size": self.autoencoder.codebook_size,
            "likelihood": bool(loss.nll),
            "perceptual": "none" if loss.perceptual is None else loss.perceptual.name,
            "perceptual_features": sorted(self.perceptual_features),
            "adversarial": "none" if adversary is None else adversary.gan_loss,
            "discriminator": None if adversary is None else adversary.shape,
            "latent_statistics": self.latent_statistics,
        }

    def finish(self, run: Run) -> tuple[dict[str, Any], Path]:
        self.module.trained.eval().float()
        self._choose_sampling_level()
        mean_and_std = resolve_statistics(self.autoencoder, self.latent_statistics)
        contract, latents = encode_latents(
            self.autoencoder, self.images, self.flip, self.cache_dir, mean_and_std=mean_and_std
        )
        del latents
        if self.trained_part == "all":
            self.autoencoder.register_scaling()
        with atomic_folder(run.autoencoder_folder) as partial:
            self.autoencoder.save(partial)
        contract.save(run.path)
        return self._evaluate_held_out(run)

    def next_command(self, run: Run) -> str:
        return run.next_training_command()

    def _choose_sampling_level(self) -> None:
        """Choose the level of the sampling decoder on training images."""
        if self.module.decoder_noise:
            count = max(1, min(MAX_LEVEL_IMAGES, MAX_INIT_PIXELS // self.images.resolution**2))
            indices = numpy_generator(0).permutation(self.images.train_indices)[:count]
            images = self.images.batch(np.sort(indices))
            z_raw = torch.cat([self.autoencoder.encode(batch)[0] for batch in images.split(self._batch_size)])
            decoder = sampling_decoder_of(self.module.trained)
            assert decoder is not None
            decoder.choose_level(images, z_raw, self.module.decoder_noise, torch_generator(0), self._batch_size)

    @property
    def _batch_size(self) -> int:
        """Batch size after training, which is smaller at higher resolutions to bound memory use."""
        return min(64, max(1, MAX_BATCH_PIXELS // self.images.resolution**2))

    def _evaluate_held_out(self, run: Run) -> tuple[dict[str, Any], Path]:
        """Compare validation reconstructions with a PCA of the same latent size. Return the metrics and a figure."""
        factor, channels, batch_size = self.autoencoder.factor, self.autoencoder.channels, self._batch_size

        def batches(indices: np.ndarray) -> Iterator[Tensor]:
            for start in range(0, len(indices), batch_size):
                yield self.images.batch(indices[start : start + batch_size])

        components = patch_components(batches(np.sort(self.images.train_indices[:MAX_INIT_IMAGES])), factor)
        decoder = sampling_decoder_of(self.autoencoder.model)
        columns: dict[str, list[Any]] = {}
        values: dict[str, list[Tensor]] = {}
        for originals in batches(self.images.val_indices[:512]):
            mean, _ = self.autoencoder.encode(originals)
            decoded = {
                "original": originals,
                "autoencoder": self.autoencoder.decode(mean).cpu(),
                "PCA, same size": project(components, originals, factor=factor, channels=channels),
            }
            if decoder is not None:
                decoded["sampling decoder"] = self.autoencoder.decode_samples(mean).cpu()
            for key, name in PSNR_METRICS.items():
                if name in decoded:
                    values.setdefault(key, []).append(psnr(originals, decoded[name]))
            values.setdefault("ssim", []).append(ssim(originals, decoded["autoencoder"]))
            for name, images in decoded.items():
                column = columns.setdefault(name, [])
                column += to_pil(images[: 10 - len(column)])
        metrics: dict[str, Any] = {"val_images": min(512, len(self.images.val_indices))}
        metrics |= {name: torch.cat(batch_values).mean().item() for name, batch_values in values.items()}
        if decoder is not None:
            metrics["sampling_level"] = decoder.level.item()
        metrics["compression"] = self.compression
        path = run.images / "held_out_reconstructions.png"
        labelled_rows(list(columns.items())).save(path)
        return metrics, path


def _latent_scale(autoencoder: Autoencoder) -> list[float]:
    """Return the standard deviation of each latent channel of a pretrained autoencoder, or 1 if it is unknown."""
    if autoencoder.statistics is not None:
        return autoencoder.statistics.latent_std
    published = published_statistics(autoencoder.model)
    return [1.0] * autoencoder.channels if published is None else published[1]


def _perceptual_features(source: str | None) -> set[str]:
    """Return the perceptual losses used to train a run and its ancestors. Metrics on the same features are biased."""
    if source is None or not (Path(source).expanduser() / RUN_FILE).is_file():
        return set()
    return set(Run.open(source).facts.get("perceptual_features", []))
