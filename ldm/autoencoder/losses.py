"""The stage-1 loss, without the adversarial term.

    L = l1 |x - x'| + mse (x - x')^2 + nll (-log p(x | z_raw)) + perceptual d(x, x')
        + kl KL(q(z_raw | x) || N(0, I)) / D     or   + codebook loss

All terms are averaged over the images in a batch. The l1, mse and nll terms are also averaged over the D pixel values
of each image.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm.autoencoder.perceptual import Perceptual
from ldm.diffusion.bound_terms import discretised_nll
from ldm.rules import NonNegative, checked

BIN_WIDTH = 2 / 255
"""Bin width of 8-bit values in images scaled to [-1, 1]."""
INITIAL_SCALE = 0.1
"""Initial standard deviation of p(x | z_raw) for each colour channel."""


class AutoencoderLoss(nn.Module):
    """Weighted sum of the distortion, the perceptual distance and the regulariser's terms.

    Args:
        l1, mse: Weights of the mean absolute error and the mean squared error.
        nll: Weight of -log p(x | z_raw) in nats per pixel value. p is a Gaussian around the reconstruction with one
            learned scale per colour channel, integrated over the bin of each 8-bit value. The two-stage bound uses this
            likelihood. With nll=1, kl=1 and all other weights 0, the loss is the negative ELBO per pixel value.
        kl: Weight of the KL divergence in nats per pixel value. Because the KL of an image is divided by the number of
            pixel values, the same weight works at every resolution. A small weight keeps the latents near N(0, I)
            without blurring the reconstructions.
    """

    @checked
    def __init__(
        self, l1: NonNegative = 1.0, mse: NonNegative = 1.0, nll: NonNegative = 0.0, kl: NonNegative = 1e-2
    ) -> None:
        super().__init__()
        self.l1, self.mse, self.nll, self.kl = l1, mse, nll, kl
        self.perceptual: Perceptual | None = None
        if nll:
            self.log_scale = nn.Parameter(torch.full((3,), math.log(INITIAL_SCALE)))

    def forward(self, images: Tensor, reconstruction: Tensor, regulariser: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss terms as scalars by name, with their weighted sum under the name `loss`.

        Args:
            images, reconstruction: [b, 3, H, W] in [-1, 1].
            regulariser: The regulariser's loss terms: `kl` in nats per image, `codebook`, or no term.
        """
        images, reconstruction = images.float(), reconstruction.float()
        error = reconstruction - images
        terms = {"l1": error.abs().mean(), "mse": error.square().mean(), **regulariser}
        loss = self.l1 * terms["l1"] + self.mse * terms["mse"]
        if self.nll:
            terms["nll"] = self.negative_log_likelihood(images, reconstruction)
            loss = loss + self.nll * terms["nll"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(images, reconstruction)
            loss = loss + self.perceptual.weight * terms["perceptual"]
        if "kl" in terms:
            loss = loss + self.kl * terms["kl"] / images[0].numel()
        if "codebook" in terms:
            loss = loss + terms["codebook"]
        return {"loss": loss, **terms}

    def sampling_distortion(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Return the loss of the sampling decoder: the mean absolute error, plus the weighted perceptual distance.

        Noisy latents leave several images possible. The squared error favours their mean, which is blurrier than their
        median.

        Args:
            images, reconstruction: [b, 3, H, W] in [-1, 1].
        """
        images, reconstruction = images.float(), reconstruction.float()
        loss = (reconstruction - images).abs().mean()
        if self.perceptual is not None:
            loss = loss + self.perceptual.weight * self.perceptual(images, reconstruction)
        return loss

    def negative_log_likelihood(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Return the mean of -log p(x | z_raw), in nats per pixel value."""
        scale = self.log_scale.exp()[:, None, None]
        return discretised_nll(images, reconstruction, scale, BIN_WIDTH, low=-1.0, high=1.0).mean().float()
