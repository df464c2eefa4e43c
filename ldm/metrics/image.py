"""Image distortion (PSNR, SSIM), and PCA of image patches as a linear baseline."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

MAX_CHUNK_PIXELS = 2**20
"""Maximum number of pixels converted to float64 at a time (25 MB) while the covariance of patches is accumulated."""


def psnr(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image in dB, [b], for images [b, c, H, W] in [-1, 1] (peak 2)."""
    mse = (images.float() - reconstruction.float()).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    return 10 * torch.log10(4 / mse)


MIN_SSIM_SIDE = 6
"""Smallest image side, in pixels, that can be padded by reflection for the SSIM window."""


def ssim(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the structural similarity of each image, [b], for images [b, c, H, W] in [-1, 1].

    The window is an 11 x 11 Gaussian (torchmetrics). Intensities are first mapped to [0, 1], as in published results,
    because the luminance term is meaningless for negative intensities.
    """
    a, b = ((x.float() + 1) / 2 for x in (reconstruction, images))
    with torch.autocast(a.device.type, enabled=False):  # bfloat16 is too coarse for differences of means
        values = structural_similarity_index_measure(a, b, data_range=(0.0, 1.0), reduction="none")
    assert isinstance(values, Tensor)
    return values


def pca_reconstruction(train: Tensor, images: Tensor, *, factor: int, channels: int) -> Tensor:
    """Reconstruct images from the first `channels` principal components of their f x f patches.

    The coefficients of an image have as many values as a latent with this downsampling factor and number of channels.

    Args:
        train: Images to fit the components to, [n, 3, H, W] in [-1, 1].
        images: Images to reconstruct, [b, 3, H, W].

    Returns:
        [b, 3, H, W], clamped to [-1, 1].
    """
    return project(patch_components([train], factor), images, factor=factor, channels=channels)


def project(components: tuple[Tensor, Tensor], images: Tensor, *, factor: int, channels: int) -> Tensor:
    """Reconstruct images as `pca_reconstruction` does, given the mean and basis from `patch_components`."""
    mean, basis = components[0], components[1][:, :channels]
    return fold((unfold(images, factor) - mean) @ basis @ basis.T + mean, factor).clamp(-1, 1)


def patch_components(batches: Iterable[Tensor], factor: int) -> tuple[Tensor, Tensor]:
    """Return the mean [d] and the principal components [d, d] of f x f image patches, where d = 3 f^2.

    The components are the columns, in order of decreasing variance. The covariance is accumulated over the batches
    [b, 3, H, W] in chunks of at most MAX_CHUNK_PIXELS, so that memory use depends on neither the number nor the size of
    the images.
    """
    count, total, squares = 0, torch.zeros(1).double(), torch.zeros(1, 1).double()
    for images in batches:
        for chunk in images.split(max(1, MAX_CHUNK_PIXELS // images[0, 0].numel())):
            patches = unfold(chunk, factor).flatten(0, 2)
            count += len(patches)
            total = total + patches.sum(0)
            squares = squares + patches.T @ patches
    mean = total / count
    _, basis = torch.linalg.eigh(squares / count - torch.outer(mean, mean))
    return mean, basis.flip(1)


def unfold(images: Tensor, factor: int) -> Tensor:
    """Split images [b, 3, H, W] into f x f patches, [b, H / f, W / f, 3 f^2] in float64."""
    return F.pixel_unshuffle(images, factor).permute(0, 2, 3, 1).double()


def fold(patches: Tensor, factor: int) -> Tensor:
    """Invert `unfold`, in float32."""
    return F.pixel_shuffle(patches.permute(0, 3, 1, 2), factor).float()
