"""How good the samples are, in numbers that name their features, N and reference set."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ldm.data.images import ImageData
from ldm.data.order import derive_seed
from ldm.diffusion.sampler import SamplerLike
from ldm.errors import UserError
from ldm.evaluation.classifier import Classifier, load_classifier
from ldm.evaluation.metrics import kernel_distance, retrieval_ranks
from ldm.features import CHOICES
from ldm.networks.conditioning import TextCondition
from ldm.pipeline import LatentDiffusionPipeline, sample_generators
from ldm.sampling import Request, check_interval, describe, draw


@dataclass(frozen=True)
class Evaluation:
    """Figures by name, and lines that say them in words."""

    figures: dict[str, Any]
    lines: list[str]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.figures, indent=2) + "\n", encoding="utf-8")


def load_features(name: str, images: ImageData | None = None) -> nn.Module:
    """Frozen features by name; with `images` also those of a classifier that is trained on them.

    Raises:
        UserError: unknown, or what `load_classifier` refuses.
    """
    if images is not None and name == Classifier.name:
        return load_classifier(images)
    if name not in CHOICES:
        known = [*CHOICES, *([] if images is None else [Classifier.name])]
        raise UserError(f"features={name} is unknown. Choose one of: {', '.join(known)}.")
    return CHOICES[name]()


def evaluate(
    pipeline: LatentDiffusionPipeline,
    images: ImageData,
    sampler: SamplerLike,
    *,
    features: str = "efficientnet_lite",
    num_samples: int = 256,
    guidance: float = 3.0,
    guidance_interval: Any = (0.0, 1.0),
    seed: int = 0,
    batch_size: int = 64,
) -> Evaluation:
    """Compare samples for seed-drawn training captions with the training images.

    The anchors: the autoencoder's reconstructions of the same images (the best that its decoder can show), the
    autoencoder as a generator of its own (z_raw ~ N(0, I) decoded, what a VAE without the chain would draw), the
    validation images (what new images of this kind look like), and for retrieval chance.
    """
    network = load_features(features, images)
    train = images.train_indices
    chosen = np.random.default_rng(derive_seed(seed, 1)).permutation(len(train))[: min(num_samples, len(train))]
    own = train[chosen]
    request = Request.of_images(pipeline, images, own)
    options: dict[str, Any] = {"guidance": guidance, "guidance_interval": guidance_interval, "seed": seed}
    sampled = torch.cat(list(draw(pipeline, request, sampler, batch_size=batch_size, **options)))
    originals = images.batch(own)
    reconstructed = torch.cat(
        [
            pipeline.autoencoder.decode(pipeline.autoencoder.encode(part)[0]).cpu()
            for part in originals.split(batch_size)
        ]
    )
    noise = torch.stack(
        [torch.randn(pipeline.latent_shape, generator=g) for g in sample_generators(seed, range(len(own)))]
    )
    alone = torch.cat([pipeline.autoencoder.decode(part).cpu() for part in noise.split(batch_size)])
    reference = reference_features(network, features, images)
    gallery = reference[torch.from_numpy(train)]
    found = {
        "samples": extract(network, sampled, "features of samples"),
        "reconstructions": extract(network, reconstructed, "features of reconstructions"),
        "VAE alone": extract(network, alone, "features of the VAE alone"),
        "validation images": reference[torch.from_numpy(images.val_indices)],
    }
    figures: dict[str, Any] = {
        "features": features,
        "num_samples": len(own),
        "reference": f"{images.name}/train@{images.fingerprint[:8]}",
        "num_reference": len(train),
        "guidance": guidance,
        "guidance_interval": check_interval(guidance_interval),
        "sampler": describe(sampler),
        "seed": seed,
    }
    lines = [f"KD ({features}, N={len(own)}, ref={figures['reference']}, N={len(train)}), mean of 4 disjoint subsets:"]
    for name, values in found.items():
        mean, error = kernel_distance(values, gallery)
        key = name.split()[0].lower()
        figures[f"kd_{key}"], figures[f"kd_{key}_standard_error"] = mean, error
        lines.append(f"  {name:18} {mean:8.4f} +- {error:.4f} (standard error, sampling only)")
    if isinstance(pipeline.conditioning, TextCondition):
        rows = torch.from_numpy(chosen)
        lines.append(f"Retrieval of the caption's own image among {len(train)} training images, {features}:")
        for name in ("samples", "reconstructions"):
            ranks = retrieval_ranks(found[name], gallery, rows)
            at_1, at_5 = ((ranks < k).float().mean().item() for k in (1, 5))
            figures[f"retrieval_at_1_{name}"], figures[f"retrieval_at_5_{name}"] = at_1, at_5
            lines.append(f"  {name:18} @1 {at_1:6.1%}   @5 {at_5:6.1%}")
        figures["retrieval_at_1_chance"], figures["retrieval_at_5_chance"] = 1 / len(train), 5 / len(train)
        lines.append(f"  {'chance':18} @1 {1 / len(train):6.2%}   @5 {5 / len(train):6.2%}")
    return Evaluation(figures, lines)


def extract(network: nn.Module, images: Tensor | ImageData, title: str, batch_size: int = 64) -> Tensor:
    """Features of images [N, 3, H, W], or of a whole data set, a batch at a time; with a progress bar."""
    device = next(network.parameters()).device
    parts = []
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar, torch.no_grad():
        task = bar.add_task("", total=len(images))
        for start in range(0, len(images), batch_size):
            rows = range(start, min(start + batch_size, len(images)))
            part = images[rows.start : rows.stop] if isinstance(images, Tensor) else images.batch(rows)
            parts.append(network(part.to(device)).float().cpu())
            bar.advance(task, len(part))
    return torch.cat(parts)


def reference_features(network: nn.Module, name: str, images: ImageData) -> Tensor:
    """Features of every image of a data set, computed once and kept in its cache folder.

    Under the network's `key`, where it has one, for it is one of many of that name.
    """
    file = images.path / f"features-{getattr(network, 'key', name)}.npy"
    if not file.is_file():
        found = extract(network, images, f"features of {images.name}")
        partial = file.with_suffix(".partial.npy")
        np.save(partial, found.numpy())
        partial.replace(file)
    return torch.from_numpy(np.load(file))
