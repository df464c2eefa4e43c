"""Regularisers of the latents: a KL to N(0, I), a codebook, or none.

A regulariser builds the model variant that it needs and computes reconstructions and loss terms. Stage 2 always sees a
posterior: a Gaussian with 'kl', or a point with 'vq' and 'none'. With 'vq', the point is the encoder output before
quantisation, and decoding the point quantises it.
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, VQModel
from pydantic import Field
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from ldm.autoencoder.patch import PatchAutoencoderKL, PatchVQModel
from ldm.autoencoder.point_posterior import encode_to_mean, has_point_posterior, zero_posterior_noise
from ldm.errors import InputError
from ldm.rules import Count, Integer, NonNegative, checked
from ldm.runtime.distributed import gather_rows
from ldm.runtime.random import torch_generator

VQ_COUNTERPARTS: dict[Any, type[nn.Module]] = {AutoencoderKL: VQModel, PatchAutoencoderKL: PatchVQModel}
"""Maps each architecture with a posterior to the same architecture with a codebook."""
MAX_VECTORS, MAX_KMEANS_VECTORS, NUM_KMEANS_ITERATIONS = 262_144, 65_536, 5
"""Maximum number of encoder outputs to sample, maximum number to cluster, and number of k-means iterations."""
RESTARTS_END = 0.75
"""Fraction of the training budget after which idle codes are no longer restarted.

The EMA weights lag behind the trained weights, so they would not fully reflect later restarts.
"""

ImageSource = Callable[[], Tensor]
Noise = Callable[[Sequence[int]], Tensor]
"""Maps a shape to a sample from N(0, I)."""


class Reconstruction(NamedTuple):
    """Reconstructions for a batch, and the regulariser's loss terms."""

    images: Tensor
    """[b, 3, H, W], not clamped."""
    terms: dict[str, Tensor]
    """Scalar loss terms by name: `kl` in nats per image, or `codebook`, a mean squared distance in latent units."""
    z_raw: Tensor
    """The decoded latents, [b, C, h, w]."""
    codes: Tensor | None = None
    """Index of the code at each location, [b h w]; None without a codebook."""


class Regulariser(nn.Module):
    """Base class of the three regularisers. `name` is the name that selects a regulariser on the command line."""

    name: str
    codebook_size: int | None = None

    def build(self, model: Callable[..., nn.Module], sample_size: int) -> nn.Module:
        """Build the variant of the chosen architecture that this regulariser needs."""
        return model(sample_size=sample_size)

    def check(self, model: nn.Module) -> None:
        """Check that a loaded model fits this regulariser.

        Raises:
            InputError: The model does not fit. The message says what to use instead.
        """
        if isinstance(model, VQModel | PatchVQModel):
            rule = f"must be vq, because the initial autoencoder is a {type(model).__name__}, which has a codebook"
            raise InputError("regulariser", self.name, rule)

    def initialise(self, model: nn.Module, images: ImageSource, seed: int, device: torch.device) -> None:  # noqa: B027
        """Initialise a new model before training. `images` returns a sample from the training split, [b, 3, H, W]."""

    @abstractmethod
    def reconstruct(self, model: Any, images: Tensor, noise: Noise | None) -> Reconstruction:
        """Encode and decode a batch. If `noise` is None, as in validation, decode the posterior mean."""

    def after_step(  # noqa: B027
        self, model: nn.Module, generator: torch.Generator, progress: float, skip: Tensor | None = None
    ) -> None:
        """Update the regulariser's state after an optimizer step.

        Args:
            model: The trained model.
            generator: Random generator on the model's device.
            progress: Fraction of the training budget used so far.
            skip: Boolean scalar on the model's device: True if the optimizer skipped this step, in which case the state
                does not change either. None if steps are never skipped.
        """

    def clear_batches(self) -> None:  # noqa: B027
        """Discard the recorded batches. Called before the first step, to drop batches that were not trained on."""


class KL(Regulariser):
    """Gaussian posterior z_raw ~ q(z_raw | x), with KL(q || N(0, I)) in the loss."""

    name = "kl"

    def check(self, model: nn.Module) -> None:
        super().check(model)
        if has_point_posterior(model):
            rule = "must be none, because the initial autoencoder has no KL: its posterior is a point"
            raise InputError("regulariser", self.name, rule)

    def reconstruct(self, model: Any, images: Tensor, noise: Noise | None) -> Reconstruction:
        posterior = model.encode(images).latent_dist
        z_raw = posterior.mean
        if noise is not None:
            z_raw = z_raw + posterior.std * noise(z_raw.shape)
        return Reconstruction(model.decode(z_raw).sample, {"kl": posterior.kl().float().mean()}, z_raw)


class Unregularised(Regulariser):
    """A plain autoencoder as a baseline: the posterior is a point, and the loss has no regularisation term."""

    name = "none"

    def initialise(self, model: nn.Module, images: ImageSource, seed: int, device: torch.device) -> None:
        zero_posterior_noise(model)

    def reconstruct(self, model: Any, images: Tensor, noise: Noise | None) -> Reconstruction:
        z_raw = encode_to_mean(model, images)
        return Reconstruction(model.decode(z_raw).sample, {}, z_raw)


class VectorQuantised(Regulariser):
    """VQ-VAE on diffusers' VQModel: the vector at each latent location is replaced by its nearest code e.

        codebook = |sg(z) - e|^2 + commitment |z - sg(e)|^2, averaged over the values of the latents

    The codebook is initialised by k-means on the distinct encoder outputs. A code that has been unused for
    `restart_after` steps is restarted at an encoder output from the current batch. The probability of choosing an
    output is proportional to the squared distance between the output and its nearest code. With uniform sampling, most
    codes would restart at the plain background of the images, which already has a code.
    Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 3. Restarts with uniform sampling: Dhariwal et al. 2020,
    arXiv:2005.00341, section 3.1.

    Raises:
        InputError: An argument is out of range.
    """

    name = "vq"
    codebook_size: int
    idle_steps: Tensor

    @checked
    def __init__(
        self,
        codebook_size: Annotated[Integer, Field(ge=2, le=2**24)] = 1024,
        commitment: NonNegative = 0.25,
        restart_after: Count = 100,
    ) -> None:
        super().__init__()
        self.codebook_size, self.commitment, self.restart_after = codebook_size, commitment, restart_after
        self.register_buffer("idle_steps", torch.zeros(codebook_size, dtype=torch.long))
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def build(self, model: Callable[..., nn.Module], sample_size: int) -> nn.Module:
        if not isinstance(model, partial) or model.func not in VQ_COUNTERPARTS:
            kinds = " or ".join(kind.__name__ for kind in VQ_COUNTERPARTS)
            raise InputError("regulariser", self.name, f"requires an architecture that supports a codebook: {kinds}")
        options = {**model.keywords, "vq_embed_dim": model.keywords.get("latent_channels", 4)}
        return VQ_COUNTERPARTS[model.func](**options, num_vq_embeddings=self.codebook_size, sample_size=sample_size)

    def check(self, model: nn.Module) -> None:
        if not isinstance(model, VQModel | PatchVQModel):
            kind = type(model).__name__
            rule = f"must be kl or none, because the initial autoencoder is a {kind}, which has no codebook"
            raise InputError("regulariser", self.name, rule)
        size = quantiser(model).n_e
        if size != self.codebook_size:
            rule = f"must be {size}, the codebook size of the initial autoencoder"
            raise InputError("codebook_size", self.codebook_size, rule)

    @torch.no_grad()
    def initialise(self, model: Any, images: ImageSource, seed: int, device: torch.device) -> None:
        model.to(device)
        vectors: list[Tensor] = []
        for batch in images().split(32):
            vectors.append(to_vectors(model.encode(batch.to(device)).latents).cpu())
            if sum(map(len, vectors)) >= MAX_VECTORS:
                break
        model.to("cpu")
        z = torch.cat(vectors).round(decimals=3).unique(dim=0)
        if len(z) < self.codebook_size:
            return  # too few vectors for k-means; keep diffusers' initialisation
        indices = torch.randperm(len(z), generator=torch_generator(seed))[:MAX_KMEANS_VECTORS]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "One of the clusters is empty")  # an empty one keeps its centroid
            centroids, _ = kmeans2(
                z[indices].double().numpy(), self.codebook_size, NUM_KMEANS_ITERATIONS, minit="points", seed=seed
            )
        quantiser(model).embedding.weight.copy_(torch.from_numpy(centroids))

    def reconstruct(self, model: Any, images: Tensor, noise: Noise | None) -> Reconstruction:
        vector_quantiser = quantiser(model)
        z = model.encode(images).latents
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            z_q, _, (_, _, codes) = vector_quantiser(z)
            entries = vector_quantiser.embedding(codes.reshape(-1))
            # diffusers' own loss (legacy=True) is not used: it weights the codebook term instead of the commitment term
            codebook = (to_vectors(z).detach() - entries).square().mean()
            commitment = (to_vectors(z) - entries.detach()).square().mean()
        if noise is not None:
            distance = (to_vectors(z) - entries).detach().square().sum(1)
            self._batches.append((to_vectors(z).detach(), distance, codes.reshape(-1)))
        terms = {"codebook": codebook + self.commitment * commitment}
        return Reconstruction(model.decode(z_q, force_not_quantize=True).sample, terms, z_q, codes.reshape(-1))

    @torch.no_grad()
    def after_step(
        self, model: nn.Module, generator: torch.Generator, progress: float, skip: Tensor | None = None
    ) -> None:
        """Restart idle codes at vectors from this step's batches, without synchronising the device."""
        weight = quantiser(model).embedding.weight
        if not self._batches or not weight.requires_grad:
            return self.clear_batches()
        backup = [] if skip is None else [(x, x.clone()) for x in (weight, self.idle_steps)]
        z, distance, codes = (gather_rows(tensors) for tensors in zip(*self._batches, strict=True))
        self.clear_batches()
        self.idle_steps += 1
        self.idle_steps[codes] = 0
        distance = distance + torch.finfo(z.dtype).tiny  # multinomial requires positive probabilities
        distance = distance.nan_to_num(1, posinf=1)  # distances can be non-finite in a skipped step
        restarts = z[torch.multinomial(distance, self.codebook_size, replacement=True, generator=generator)]
        if dist.is_available() and dist.is_initialized():  # rounding could lead to different samples on each rank
            dist.broadcast(restarts, src=0)
        if progress < RESTARTS_END:
            idle = self.idle_steps >= self.restart_after
            weight.copy_(torch.where(idle[:, None], restarts, weight))
            self.idle_steps.masked_fill_(idle, 0)
        for x, value in backup:
            x.copy_(torch.where(skip, value, x))  # type: ignore[arg-type]
        return None

    def clear_batches(self) -> None:
        self._batches = []


def quantiser(model: Any) -> Any:
    """Return the diffusers VectorQuantizer of a VQ model."""
    return model.core.quantize if isinstance(model, PatchVQModel) else model.quantize


def to_vectors(z: Tensor) -> Tensor:
    """Reshape latents [b, C, h, w] to vectors [b h w, C] in float32, in the order of the quantiser's codes."""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).float()
