"""What keeps latents in a form that stage 2 can learn: a KL to N(0, I), a codebook, or nothing.

A regulariser makes the model that it needs, and takes a batch through it. What it leaves for stage 2 is always a
posterior: a Gaussian with `kl`, a point with `vq` (the encoder's output before quantisation; decoding quantises) and
with `none`.
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
from ldm.autoencoder.point_posterior import is_pinned, pin_posterior
from ldm.errors import InputError
from ldm.rules import Count, Integer, NonNegative, checked
from ldm.runtime.distributed import gather_rows
from ldm.runtime.random import torch_generator

CODEBOOK_FORM: dict[Any, type[nn.Module]] = {AutoencoderKL: VQModel, PatchAutoencoderKL: PatchVQModel}
"""The same architecture with a codebook instead of a posterior."""
MOST_VECTORS, KMEANS_VECTORS, KMEANS_ROUNDS = 262_144, 65_536, 5
"""Outputs that are looked at, distinct ones among them that are clustered, and rounds of it."""
RESTARTS_END = 0.75
"""The share of the budget after which no code is moved: the averaged weights take their time to follow."""

ImageSource = Callable[[], Tensor]
Noise = Callable[[Sequence[int]], Tensor]
"""Shape -> values drawn from N(0, 1)."""


class Reconstruction(NamedTuple):
    """A batch through encoder and decoder, and what the regulariser has to say of it."""

    images: Tensor
    """[b, 3, H, W], not clamped."""
    terms: dict[str, Tensor]
    """Scalars by name: `kl` in nats per image, or `codebook`, mean squared distances in the latent's units."""
    codes: Tensor | None = None
    """The codes of the batch's locations, [b h w], where there is a codebook."""


class Regulariser(nn.Module):
    """Base of the three; `name` is what the command line calls it."""

    name: str
    codebook_size: int | None = None

    def build(self, model: Callable[..., nn.Module], sample_size: int) -> nn.Module:
        """The model of an `autoencoder=` choice, as this regulariser needs it."""
        return model(sample_size=sample_size)

    def check(self, model: nn.Module) -> None:
        """Refuse a model that was loaded and is of another kind.

        Raises:
            InputError: naming the regulariser that goes with it.
        """
        if isinstance(model, VQModel | PatchVQModel):
            rule = f"must be vq: the autoencoder to start from is a {type(model).__name__}, which has a codebook"
            raise InputError("regulariser", self.name, rule)

    def start(self, model: nn.Module, images: ImageSource, seed: int, device: torch.device) -> None:  # noqa: B027
        """Bring a fresh model to where training begins; `images` gives some of the training split, [b, 3, H, W]."""

    @abstractmethod
    def reconstruct(self, model: Any, images: Tensor, noise: Noise | None) -> Reconstruction:
        """Encode and decode a batch that is trained on; without noise one that is not, at the posterior's mean."""

    def after_step(  # noqa: B027
        self, model: nn.Module, generator: torch.Generator, progress: float, left_out: Tensor | None = None
    ) -> None:
        """Called once per optimizer step, with the share of the budget that is spent.

        Changes nothing where the step was left out, [] bool; None: it was not.
        """

    def forget(self) -> None:  # noqa: B027
        """Called before the first step: batches until now were not trained on."""


class KL(Regulariser):
    """z_raw ~ q(z_raw | x), with KL(q || N(0, I)) in the loss at the weight autoencoder.loss.kl."""

    name = "kl"

    def check(self, model: nn.Module) -> None:
        super().check(model)
        if is_pinned(model):
            rule = "must be none: the posterior of the autoencoder to start from is a point, without a KL"
            raise InputError("regulariser", self.name, rule)

    def reconstruct(self, model: Any, images: Tensor, noise: Noise | None) -> Reconstruction:
        posterior = model.encode(images).latent_dist
        z_raw = posterior.mean
        if noise is not None:
            z_raw = z_raw + posterior.std * noise(z_raw.shape)
        return Reconstruction(model.decode(z_raw).sample, {"kl": posterior.kl().float().mean()})


class Unregularised(Regulariser):
    """A plain autoencoder: the posterior is a point, and the loss is the distortion alone. A baseline."""

    name = "none"

    def start(self, model: nn.Module, images: ImageSource, seed: int, device: torch.device) -> None:
        pin_posterior(model)

    def reconstruct(self, model: Any, images: Tensor, noise: Noise | None) -> Reconstruction:
        return Reconstruction(model.decode(model.encode(images).latent_dist.mean).sample, {})


class VectorQuantised(Regulariser):
    """Each location of the latent becomes the nearest of `codebook_size` vectors: VQ-VAE, through diffusers' VQModel.

        codebook = |sg(z) - e|^2 + commitment |z - sg(e)|^2, averaged over the latent's values

    The codebook starts at the k-means of the encoder's distinct outputs, and a code that nothing was nearest to for
    `restart_after` steps is moved to a vector of the batch, drawn by its squared distance to its own code: a plain
    background, which most locations may be, has a code already.
    Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 3; restarts: Dhariwal et al. 2020, arXiv:2005.00341, 3.1,
    whose draw is uniform.

    Raises:
        InputError: a codebook of fewer than two vectors, or numbers out of their range.
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
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def build(self, model: Callable[..., nn.Module], sample_size: int) -> nn.Module:
        if not isinstance(model, partial) or model.func not in CODEBOOK_FORM:
            kinds = " or ".join(kind.__name__ for kind in CODEBOOK_FORM)
            raise InputError("regulariser", self.name, f"needs a form with a codebook, which only {kinds} has")
        options = {**model.keywords, "vq_embed_dim": model.keywords.get("latent_channels", 4)}
        return CODEBOOK_FORM[model.func](**options, num_vq_embeddings=self.codebook_size, sample_size=sample_size)

    def check(self, model: nn.Module) -> None:
        if not isinstance(model, VQModel | PatchVQModel):
            rule = f"must be kl or none: the autoencoder to start from is a {type(model).__name__}, without a codebook"
            raise InputError("regulariser", self.name, rule)
        size = quantiser(model).n_e
        if size != self.codebook_size:
            rule = f"must be {size}, the size of the codebook to start from"
            raise InputError("codebook_size", self.codebook_size, rule)

    @torch.no_grad()
    def start(self, model: Any, images: ImageSource, seed: int, device: torch.device) -> None:
        model.to(device)
        found: list[Tensor] = []
        for part in images().split(32):
            found.append(flat(model.encode(part.to(device)).latents).cpu())
            if sum(map(len, found)) >= MOST_VECTORS:
                break
        model.to("cpu")
        z = torch.cat(found).round(decimals=3).unique(dim=0)
        if len(z) < self.codebook_size:
            return  # as diffusers begins: so few vectors have no means
        chosen = torch.randperm(len(z), generator=torch_generator(seed))[:KMEANS_VECTORS]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "One of the clusters is empty")  # it stays where it began
            centroids, _ = kmeans2(
                z[chosen].double().numpy(), self.codebook_size, KMEANS_ROUNDS, minit="points", seed=seed
            )
        quantiser(model).embedding.weight.copy_(torch.from_numpy(centroids))

    def reconstruct(self, model: Any, images: Tensor, noise: Noise | None) -> Reconstruction:
        with_codes = quantiser(model)
        z = model.encode(images).latents
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            z_q, _, (_, _, codes) = with_codes(z)
            entries = with_codes.embedding(codes.reshape(-1))
            # diffusers' own term weights the codebook instead of the encoder (its `legacy`)
            codebook = (flat(z).detach() - entries).square().mean()
            commitment = (flat(z) - entries.detach()).square().mean()
        if noise is not None:
            distance = (flat(z) - entries).detach().square().sum(1)
            self._seen.append((flat(z).detach(), distance, codes.reshape(-1)))
        terms = {"codebook": codebook + self.commitment * commitment}
        return Reconstruction(model.decode(z_q, force_not_quantize=True).sample, terms, codes.reshape(-1))

    @torch.no_grad()
    def after_step(
        self, model: nn.Module, generator: torch.Generator, progress: float, left_out: Tensor | None = None
    ) -> None:
        """Move the codes that have been idle for too long to vectors of the step's batch, without a host's wait."""
        weight = quantiser(model).embedding.weight
        if not self._seen or not weight.requires_grad:
            return self.forget()
        before = [] if left_out is None else [(x, x.clone()) for x in (weight, self.idle_steps)]
        z, distance, codes = (gather_rows(parts) for parts in zip(*self._seen, strict=True))
        self.forget()
        self.idle_steps += 1
        self.idle_steps[codes] = 0
        distance = distance + torch.finfo(z.dtype).tiny  # a draw needs one that is not 0
        distance = distance.nan_to_num(1, posinf=1)  # of a step that is left out
        chosen = z[torch.multinomial(distance, self.codebook_size, replacement=True, generator=generator)]
        if dist.is_available() and dist.is_initialized():  # GPUs may sum probabilities in an order of their own
            dist.broadcast(chosen, src=0)
        if progress < RESTARTS_END:
            idle = self.idle_steps >= self.restart_after
            weight.copy_(torch.where(idle[:, None], chosen, weight))
            self.idle_steps.masked_fill_(idle, 0)
        for x, value in before:
            x.copy_(torch.where(left_out, value, x))  # type: ignore[arg-type]
        return None

    def forget(self) -> None:
        self._seen = []


def quantiser(model: Any) -> Any:
    """The diffusers VectorQuantizer of a VQ model."""
    return model.core.quantize if isinstance(model, PatchVQModel) else model.quantize


def flat(z: Tensor) -> Tensor:
    """[b, C, h, w] -> its vectors [b h w, C] in float32, in the order of the quantiser's codes."""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).float()
