"""The loss of stage 1, one number per term. Perceptual and adversarial terms will stand beside these."""

from dataclasses import dataclass

from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor


@dataclass(frozen=True)
class AutoencoderLoss:
    """L = l1 |x - x'| + mse (x - x')^2 + kl KL(q(z_raw|x) || N(0, I)) / D, averaged over pixels and images.

    The KL is in nats per image; dividing by D, the number of pixel values, keeps one weight's meaning over
    resolutions.

    Args:
        l1, mse: Weights of the two distortions.
        kl: Weight of the rate. Small: it keeps the latents near N(0, I) without costing sharpness.
    """

    l1: float = 1.0
    mse: float = 1.0
    kl: float = 1e-2

    def __call__(
        self, images: Tensor, reconstruction: Tensor, posterior: DiagonalGaussianDistribution
    ) -> dict[str, Tensor]:
        """Scalars by name; `loss` is their weighted sum. Both images are [b, 3, H, W] in [-1, 1]."""
        error = reconstruction.float() - images.float()
        l1, mse = error.abs().mean(), error.square().mean()
        kl = posterior.kl().float().mean()
        return {
            "loss": self.l1 * l1 + self.mse * mse + self.kl * kl / images[0].numel(),
            "l1": l1,
            "mse": mse,
            "kl": kl,
        }
