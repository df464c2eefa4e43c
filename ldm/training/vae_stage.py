"""Stage 1 as the front door runs it, and the latents that it leaves for stage 2."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ldm.autoencoder.autoencoder import Autoencoder, LatentStatistics
from ldm.autoencoder.loss import AutoencoderLoss, Perceptual
from ldm.autoencoder.patch import PatchAutoencoder
from ldm.autoencoder.pretrained import TrainType, choose_trained, published_statistics
from ldm.autoencoder.regulariser import Regulariser
from ldm.data.images import ImageData
from ldm.data.latents import LatentContract, measure, open_latents
from ldm.errors import UserError
from ldm.evaluation.metrics import pca_reconstruction, psnr, ssim
from ldm.pictures import rows, to_pil
from ldm.run import Run, load_autoencoder
from ldm.training.adversary import Adversary
from ldm.training.stage import OptimizerFactory, Outcome, Stage
from ldm.training.vae import VAETraining

START_IMAGES = 4096
"""Training images that the shortcut and the codebook start from, and that PCA is fitted on."""
SCALE_IMAGES = 8192
StatisticsType = Literal["measured", "published"]


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
        flip: bool,
        cache_dir: str | None,
        seed: int,
        folder: Path,
        device: torch.device,
        perceptual: Perceptual | None = None,
        adversarial: Callable[[], Adversary] | None = None,
        pretrained: str | None = None,
        train: TrainType = "all",
        latent_statistics: StatisticsType = "measured",
        init_from: str | None = None,
    ) -> None:
        self.images, self.flip, self.cache_dir = images, flip, cache_dir
        self.latent_statistics, self.trains = latent_statistics, train != "nothing"
        source = pretrained or init_from
        if source is not None:
            self.autoencoder = load_autoencoder(source)
            network = self.autoencoder.model
        else:
            assert model is not None
            network = regulariser.build(model, images.resolution)
            self.autoencoder = Autoencoder(network)
            self._start(network, regulariser, seed)
        choose_trained(network, train)
        network.train(self.trains)
        self.latent_shape = self.autoencoder.latent_shape(images.resolution)
        self.pretrained, self.regulariser, loss.perceptual = pretrained, regulariser, perceptual
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

    def _start(self, network: nn.Module, regulariser: Regulariser, seed: int) -> None:
        chosen = np.random.default_rng(seed).permutation(self.images.train_indices)[:START_IMAGES]
        images = self.images.batch(np.sort(chosen))
        if isinstance(network, PatchAutoencoder) and network.config.shortcut:
            try:
                network.init_shortcut(images)
            except ValueError as error:
                raise UserError(f"This autoencoder does not fit: {error}") from error
        regulariser.start(network, images, seed)

    @classmethod
    def check(cls, resolution: int, **options: Any) -> None:
        regulariser, source = options["regulariser"], options["pretrained"] or options["init_from"]
        part, statistics = options["train"], options["latent_statistics"]
        for key, value, known in (
            ("autoencoder.train", part, get_args(TrainType)),
            ("latent_statistics", statistics, get_args(StatisticsType)),
        ):
            if value not in known:
                raise UserError(f"{key}={value} is unknown. Choose one of: {', '.join(known)}.")
        if options["adversarial"] is not None:
            options["adversarial"]().check(resolution)
        if source is not None:
            autoencoder = load_autoencoder(source)
            autoencoder.latent_shape(resolution)
            if part != "nothing":
                regulariser.check(autoencoder.model)
            if statistics == "published":
                require_published(autoencoder)
            return
        if statistics == "published":
            raise UserError(
                "latent_statistics=published goes with a pretrained autoencoder: a new one has published nothing. "
                "Leave it at measured, or choose autoencoder=pretrained."
            )
        with torch.device("meta"):
            Autoencoder(regulariser.build(options["model"], resolution)).latent_shape(resolution)

    def fetch(self, indices: np.ndarray) -> Tensor:
        return self.images.batch(indices)

    @property
    def compression(self) -> float:
        """Pixel values per latent value."""
        return 3 * self.images.resolution**2 / math.prod(self.latent_shape)

    def rows(self) -> list[tuple[str, str]]:
        channels, height, width = self.latent_shape
        weights = list(self.module.trained.parameters())
        size, trained = (
            sum(p.numel() for p in some) / 1e6 for some in (weights, [p for p in weights if p.requires_grad])
        )
        of_them = (
            "" if trained == size else f", {trained:.1f} M of them trained" if trained else ", none of them trained"
        )
        factor, values = self.autoencoder.factor, math.prod(self.latent_shape)
        return [
            ("model", f"{type(self.module.trained).__name__}, {size:.1f} M parameters{of_them}"),
            ("latent", f"{channels} x {height} x {width} = {values} values, f = {factor}"),
            ("compression", f"{self.compression:.1f} pixel values per latent value"),
            ("regulariser", self._describe_regulariser()),
            *([("loss", self._describe_loss())] if self.trains else []),
        ]

    def _describe_regulariser(self) -> str:
        if (size := self.autoencoder.codebook_size) is not None:
            return f"vq, {size} codes = {math.log2(size):.3g} bits per location"
        return self.regulariser.name

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
            "regulariser": self.autoencoder.regulariser if self.pretrained else self.regulariser.name,
            "perceptual": "none" if loss.perceptual is None else loss.perceptual.name,
            "adversarial": "none" if adversary is None else adversary.game,
            "latent_statistics": self.latent_statistics,
        }

    def finish(self, run: Run) -> Outcome:
        self.module.trained.eval().float()
        contract, latents = encode_latents(
            self.autoencoder, self.images, self.flip, self.cache_dir, statistics=self.latent_statistics
        )
        del latents
        self.autoencoder.save(run.autoencoder_folder)
        contract.save(run.path)
        figures, picture = self._held_out(run)
        return Outcome(
            figures=figures,
            pictures=[str(picture)],
            next_command=f"python -m ldm.train stage=diffusion vae={run.path}",
        )

    def _held_out(self, run: Run) -> tuple[dict[str, Any], Path]:
        """PSNR and SSIM of the validation images beside a PCA of the same size, and a picture of both."""
        originals = self.images.batch(self.images.val_indices[:512])
        encoded = [self.autoencoder.encode(part)[0] for part in originals.split(64)]
        reconstructed = torch.cat([self.autoencoder.decode(part).cpu() for part in encoded])
        train = self.images.batch(np.sort(self.images.train_indices[:START_IMAGES]))
        pca = pca_reconstruction(train, originals, factor=self.autoencoder.factor, channels=self.autoencoder.channels)
        figures = {
            "val_images": len(originals),
            "psnr_db": psnr(originals, reconstructed).mean().item(),
            "pca_psnr_db": psnr(originals, pca).mean().item(),
            "ssim": ssim(originals, reconstructed).mean().item(),
            "compression": self.compression,
        }
        named = [("original", originals), ("autoencoder", reconstructed), ("PCA, same size", pca)]
        path = run.images / "held_out_reconstructions.png"
        rows([(name, to_pil(images[:10])) for name, images in named]).save(path)
        return figures, path


def encode_latents(
    autoencoder: Autoencoder,
    images: ImageData,
    flip: bool,
    cache_dir: str | None,
    *,
    statistics: StatisticsType = "measured",
) -> tuple[LatentContract, Any]:
    """The contract and the cached moments of these images; measures the autoencoder's statistics on the way.

    Raises:
        UserError: published statistics of an autoencoder that has none.
    """
    published = require_published(autoencoder) if statistics == "published" else None
    channels, _, _ = autoencoder.latent_shape(images.resolution)
    contract = LatentContract(
        autoencoder_sha256=autoencoder.weights_sha256(),
        data_fingerprint=images.fingerprint,
        resolution=images.resolution,
        factor=autoencoder.factor,
        channels=channels,
        val_fraction=images.val_fraction,
        flip=flip,
    )
    latents = open_latents(autoencoder.encode, contract, images, cache_dir=cache_dir)
    known = autoencoder.statistics
    if published or known is None or known.data != images.fingerprint:
        mean, std = published or measure(latents, images.train_indices)
        autoencoder.statistics = LatentStatistics(
            latent_mean=mean,
            latent_std=std,
            decoder_scale=decoder_scale(autoencoder, images, latents),
            data=images.fingerprint,
            weights_sha256=contract.autoencoder_sha256,
        )
    return contract, latents


def decoder_scale(autoencoder: Autoencoder, images: ImageData, latents: Any, batch_size: int = 64) -> list[float]:
    """Root mean square of x - decode(z_raw) per colour over the training split, z_raw drawn once per image.

    Of more than SCALE_IMAGES so many are drawn, which leaves an error of about half a percent. The maximum-likelihood
    scale of a Gaussian p(x | z_raw) with one standard deviation per colour.
    """
    generator = torch.Generator().manual_seed(0)
    squares, count = torch.zeros(3, dtype=torch.float64), 0
    chosen = np.sort(np.random.default_rng(0).permutation(images.train_indices)[:SCALE_IMAGES])
    for start in range(0, len(chosen), batch_size):
        indices = chosen[start : start + batch_size]
        mean, log_variance = latents.batch(indices)
        z_raw = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
        error = images.batch(indices) - autoencoder.decode(z_raw).cpu()
        squares += error.double().square().sum(dim=(0, 2, 3))
        count += error[:, 0].numel()
    return (squares / count).sqrt().tolist()


def require_published(autoencoder: Autoencoder) -> tuple[list[float], list[float]]:
    """The latents' mean and standard deviation that a pretrained autoencoder states.

    Raises:
        UserError: it states none.
    """
    if (found := published_statistics(autoencoder.model)) is None:
        raise UserError(
            f"latent_statistics=published: this {type(autoencoder.model).__name__} states no scaling factor. Choose "
            "latent_statistics=measured."
        )
    return found
