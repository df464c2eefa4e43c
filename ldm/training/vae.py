"""Stage 1: a KL autoencoder compresses images to latents."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.autoencoder.autoencoder import Autoencoder, LatentStatistics
from ldm.autoencoder.loss import AutoencoderLoss
from ldm.autoencoder.patch import PatchAutoencoderKL
from ldm.data.images import ImageData
from ldm.data.latents import LatentContract, measure, open_latents
from ldm.errors import UserError
from ldm.evaluation.metrics import pca_reconstruction, psnr, ssim
from ldm.pictures import rows, to_pil
from ldm.run import Run, load_autoencoder
from ldm.training.callbacks import save_grid
from ldm.training.module import TrainingModule
from ldm.training.stage import OptimizerFactory, Outcome, Stage

NUM_SHOWN = 8
PCA_IMAGES = 4096


class VAETraining(TrainingModule):
    """Trains an autoencoder on images [b, 3, H, W] in [-1, 1].

    Args:
        model: Called as diffusers' AutoencoderKL is.
        loss: Terms by name from images, reconstruction and posterior.
        optimizer: Builds the optimizer.
        seed: Noise and flips of batch k depend on seed and k alone.
        flip: Mirror half of the images.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: AutoencoderLoss,
        optimizer: OptimizerFactory,
        *,
        seed: int,
        flip: bool,
        pictures: Path,
    ) -> None:
        super().__init__(model, optimizer, seed)
        self.loss, self.flip, self.pictures = loss, flip, pictures

    def losses(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        if self.flip:
            mirrored = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
        posterior = self.trained.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=images.device)
        z_raw = posterior.mean + posterior.std * noise
        return self.loss(images, self.trained.decode(z_raw).sample, posterior)

    def validation_step(self, images: Tensor, batch_idx: int) -> None:
        posterior = self.trained.encode(images).latent_dist
        reconstruction = self.trained.decode(posterior.mean).sample.float().clamp(-1, 1)
        terms = self.loss(images, reconstruction, posterior)
        metrics = {f"val/{name}": value for name, value in terms.items()}
        metrics["val/psnr_db"] = psnr(images, reconstruction).mean()
        metrics["val/ssim"] = ssim(images, reconstruction).mean()
        self.log_dict(metrics, batch_size=len(images), sync_dist=True)
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self._show(images[:NUM_SHOWN], reconstruction[:NUM_SHOWN])

    def _show(self, images: Tensor, reconstruction: Tensor) -> None:
        originals, reconstructed = to_pil(images), to_pil(reconstruction)
        picture = rows([("original", originals), ("reconstruction", reconstructed)])
        pairs = [image for pair in zip(originals, reconstructed, strict=True) for image in pair]
        captions = [f"{kind} {i}" for i in range(len(originals)) for kind in ("original", "reconstruction")]
        save_grid(self, self.pictures, "reconstructions", picture, pairs, captions)


class VAEStage(Stage):
    """Stage 1 as the front door runs it.

    Args:
        model: A diffusers KL autoencoder, or ours around it.
        loss: Its loss.
        optimizer: parameter groups -> optimizer.
        init_from: A run, diffusers folder or hub id whose weights to start from, instead of a fresh `model`.
    """

    kind = "vae"

    def __init__(
        self,
        *,
        model: Callable[..., nn.Module],
        loss: AutoencoderLoss,
        optimizer: Callable[..., torch.optim.Optimizer],
        images: ImageData,
        flip: bool,
        cache_dir: str | None,
        seed: int,
        folder: Path,
        device: torch.device,
        init_from: str | None = None,
    ) -> None:
        self.images, self.flip, self.cache_dir = images, flip, cache_dir
        if init_from is not None:
            network = load_autoencoder(init_from).model.train().requires_grad_(True)
        else:
            network = model(sample_size=images.resolution)
            if isinstance(network, PatchAutoencoderKL) and network.config.shortcut:
                chosen = np.random.default_rng(seed).permutation(images.train_indices)[:PCA_IMAGES]
                if images.resolution % network.factor == 0:
                    try:
                        network.init_shortcut(images.batch(np.sort(chosen)))
                    except ValueError as error:
                        raise UserError(f"This autoencoder does not fit: {error}") from error
        self.autoencoder = Autoencoder(network)
        self.latent_shape = self.autoencoder.latent_shape(images.resolution)
        self.module = VAETraining(
            network, loss, OptimizerFactory(optimizer), seed=seed, flip=flip, pictures=folder / "images"
        )

    @classmethod
    def check(cls, resolution: int, **options: Any) -> None:
        if options["init_from"] is not None:
            load_autoencoder(options["init_from"]).latent_shape(resolution)
            return
        with torch.device("meta"):
            Autoencoder(options["model"](sample_size=resolution)).latent_shape(resolution)

    def fetch(self, indices: np.ndarray) -> Tensor:
        return self.images.batch(indices)

    @property
    def compression(self) -> float:
        """Pixel values per latent value."""
        return 3 * self.images.resolution**2 / math.prod(self.latent_shape)

    def rows(self) -> list[tuple[str, str]]:
        channels, height, width = self.latent_shape
        parameters = sum(p.numel() for p in self.module.trained.parameters())
        factor, values = self.autoencoder.factor, math.prod(self.latent_shape)
        return [
            ("model", f"{type(self.module.trained).__name__}, {parameters / 1e6:.1f} M parameters"),
            ("latent", f"{channels} x {height} x {width} = {values} values, f = {factor}"),
            ("compression", f"{self.compression:.1f} pixel values per latent value"),
        ]

    def facts(self) -> dict[str, Any]:
        return {"latent_shape": list(self.latent_shape), "factor": self.autoencoder.factor}

    def finish(self, run: Run) -> Outcome:
        self.module.trained.eval().float()
        contract, latents = encode_latents(self.autoencoder, self.images, self.flip, self.cache_dir)
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
        train = self.images.batch(np.sort(self.images.train_indices[:PCA_IMAGES]))
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
    autoencoder: Autoencoder, images: ImageData, flip: bool, cache_dir: str | None
) -> tuple[LatentContract, Any]:
    """The contract and the cached moments of these images; measures the autoencoder's statistics on the way."""
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
    if known is None or known.data != images.fingerprint:
        mean, std = measure(latents, images.train_indices)
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

    The maximum-likelihood scale of a Gaussian p(x | z_raw) with one standard deviation per colour.
    """
    generator = torch.Generator().manual_seed(0)
    squares, count = torch.zeros(3, dtype=torch.float64), 0
    for start in range(0, len(images.train_indices), batch_size):
        indices = images.train_indices[start : start + batch_size]
        mean, log_variance = latents.batch(indices)
        z_raw = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
        error = images.batch(indices) - autoencoder.decode(z_raw).cpu()
        squares += error.double().square().sum(dim=(0, 2, 3))
        count += error[:, 0].numel()
    return (squares / count).sqrt().tolist()
