"""How good the samples are, in numbers that name their features, N and reference set."""

import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from scipy import stats
from torch import Tensor, nn

from ldm.data.images import ImageData
from ldm.diffusion.sampler import SamplerLike
from ldm.durable import durable_file, write_text
from ldm.errors import UserError
from ldm.evaluation import nearest_picture
from ldm.evaluation.classifier import Classifier
from ldm.evaluation.feature_extraction import ImageSet, extract, load_features, reference_features
from ldm.evaluation.feature_metrics import NUM_GROUPS, class_accuracy, class_shift, named_classes
from ldm.evaluation.image_sets import Reconstructions, VAEAlone
from ldm.evaluation.kept_samples import KeptSamples, chosen_training_rows, draw_and_keep
from ldm.evaluation.memorisation import QUANTILE, Memorisation, nearest_training
from ldm.evaluation.metrics import NUM_SUBSETS, retrieval_ranks
from ldm.evaluation.sample_distances import COLUMNS, Measures, halves, table
from ldm.networks.conditioning import ClassCondition, TextCondition
from ldm.pipeline import LatentDiffusionPipeline
from ldm.sampling import check_interval, describe

FLOOR = "floor, train to train"
FEWEST = 2 * NUM_SUBSETS
"""Images of which a distance and its error can be told."""


@dataclass(frozen=True)
class Evaluation:
    """Figures by name, lines that say them in words, pictures by file name."""

    figures: dict[str, Any]
    lines: list[str]
    pictures: dict[str, Image.Image] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """The figures at `path`, the pictures beside it."""
        for name, picture in self.pictures.items():
            with durable_file(path.with_name(name)) as partial:
                picture.save(partial)
        write_text(path, json.dumps(self.figures, indent=2) + "\n")


def evaluate(
    pipeline: LatentDiffusionPipeline,
    images: ImageData,
    sampler: SamplerLike,
    *,
    features: str = "efficientnet_lite",
    features_path: str | None = None,
    num_samples: int = 256,
    guidance: float = 3.0,
    guidance_interval: Any = (0.0, 1.0),
    seed: int = 0,
    batch_size: int = 64,
    folder: Path | None = None,
) -> Evaluation:
    """Compare samples for seed-drawn training captions with the training images.

    The anchors: the autoencoder's reconstructions of the same images (the best that its decoder can show), the
    autoencoder as a generator of its own (z_raw ~ N(0, I) decoded, what a VAE without the chain would draw), the
    validation images (what new images of this kind look like), training images against the others (the floor: what
    the measures say of one distribution), and for retrieval chance.

    Args:
        features_path: Folder or hub id of the features' weights.
        folder: Where samples are kept as they are drawn, and are looked for first; None keeps none.

    Raises:
        UserError: numbers that are none, what `load_features` and `draw_and_keep` refuse.
    """
    for key, value, least in (("num_samples", num_samples, FEWEST), ("batch_size", batch_size, 1)):
        if type(value) is not int or value < least:
            raise UserError(f"{key}={value} must be a whole number of {least} at least.")
    if len(images.train_indices) < FEWEST:
        raise UserError(f"{images.name} has {len(images.train_indices)} training images; distances need {FEWEST}.")
    network = load_features(features, images, features_path).to(pipeline.device)
    options: dict[str, Any] = {"guidance": guidance, "guidance_interval": guidance_interval, "seed": seed}
    chosen = chosen_training_rows(images, num_samples, seed)
    own = images.train_indices[chosen]
    with ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        kept = draw_and_keep(
            pipeline, images, sampler, place, num_samples=num_samples, batch_size=batch_size, **options
        )
        reference = reference_features(network, features, images)
        train, validation = (reference[torch.from_numpy(rows)] for rows in (images.train_indices, images.val_indices))
        sets: dict[str, ImageSet] = {
            "samples": kept,
            "reconstructions": Reconstructions(pipeline, images, own[: len(train)]),
        }
        if pipeline.autoencoder.has_density:  # a codebook or a point has no N(0, I) to draw from
            sets["VAE alone"] = VAEAlone(pipeline, num_samples, seed)
        found = {name: extract(network, part, f"features of {name}", batch_size) for name, part in sets.items()}
        found["validation images"] = validation
        figures: dict[str, Any] = {
            "features": features,
            "features_key": getattr(network, "key", features),
            "num_samples": num_samples,
            "reference": f"{images.name}/train@{images.fingerprint[:8]}",
            "num_reference": len(train),
            "guidance": guidance,
            "guidance_interval": check_interval(guidance_interval),
            "sampler": describe(sampler),
            "seed": seed,
            "network_evaluations_per_sample": kept.evaluations,
            "seconds_per_sample": kept.seconds,
        }
        lines = _distances(network, found, train, figures)
        if isinstance(network, Classifier):
            lines += _classes(network, found, images, kept, own, figures, of_class=pipeline.conditioning)
        if isinstance(pipeline.conditioning, TextCondition):
            lines += _retrieval(found, train, torch.from_numpy(chosen), figures)
        memorisation = nearest_training(found["samples"], train, validation)
        lines += _memorisation(memorisation, images, figures)
        picture = nearest_picture.draw(kept, images, memorisation)
    return Evaluation(figures, lines, {"nearest.png": picture})


def _distances(network: nn.Module, found: Mapping[str, Tensor], train: Tensor, figures: dict[str, Any]) -> list[str]:
    """Every set in one table, and the floor."""
    features, reference = figures["features"], figures["reference"]
    measures = Measures.choose(train, len(found["samples"]), with_cmmd=features == "clip")
    rows = {name: (len(values), measures.of(values)) for name, values in found.items()}
    some, others = halves(train, len(found["samples"]), figures["seed"])
    rows[FLOOR] = (len(some), measures.of(some, others))
    components = figures["fd_components"] = measures.num_components
    figures["fd_name"] = measures.fd_name(network)
    for name, (num, values) in rows.items():
        key = name.split()[0].lower().rstrip(",")
        figures[f"num_{key}"] = num
        for measure in COLUMNS:
            if measure in values:
                numbers = values[measure] or (None, None)
                figures[f"{measure}_{key}"], figures[f"{measure}_{key}_standard_error"] = numbers
    form = "" if components is None else f" (FD on {components} PCA components of {reference})"
    return [
        f"{features}{form}, ref={reference}, N={len(train)}; floor: {len(some)} of these against the other "
        f"{len(others)}:",
        *table(rows, figures["fd_name"]),
        "  +- is a standard error of drawing other images, not of training again. FD: all N, jackknife over the "
        f"samples; the rest: mean of {NUM_SUBSETS}",
        "  disjoint subsets"
        + (", but CMMD of all N" if measures.with_cmmd else "")
        + f": their errors have {NUM_SUBSETS - 1} degrees of freedom (95 % within {_half_width(NUM_SUBSETS - 1):.1f} "
        "of them),",
        f"  FD's {NUM_GROUPS - 1} (within {_half_width(NUM_GROUPS - 1):.1f}). Compare rows of one N only.",
    ]


def _half_width(dof: int) -> float:
    """Of a 95 % interval, in standard errors of so many degrees of freedom."""
    return float(stats.t.ppf(0.975, dof))


def _retrieval(found: Mapping[str, Tensor], train: Tensor, rows: Tensor, figures: dict[str, Any]) -> list[str]:
    """Is the training image of the caption the nearest?"""
    lines = [f"Retrieval of the caption's own image among {len(train)} training images, {figures['features']}:"]
    for name in ("samples", "reconstructions"):
        ranks = retrieval_ranks(found[name], train, rows[: len(found[name])])
        at_1, at_5 = ((ranks < k).float().mean().item() for k in (1, 5))
        figures[f"retrieval_at_1_{name}"], figures[f"retrieval_at_5_{name}"] = at_1, at_5
        lines.append(f"  {name:18} @1 {at_1:6.1%}   @5 {at_5:6.1%}")
    figures["retrieval_at_1_chance"], figures["retrieval_at_5_chance"] = 1 / len(train), 5 / len(train)
    return [*lines, f"  {'chance':18} @1 {1 / len(train):6.2%}   @5 {5 / len(train):6.2%}"]


def _classes(
    classifier: Classifier,
    found: Mapping[str, Tensor],
    images: ImageData,
    kept: KeptSamples,
    own: Any,
    figures: dict[str, Any],
    of_class: Any,
) -> list[str]:
    """Are all classes drawn, and where one was asked for, that one?"""
    named = {name: named_classes(classifier, values) for name, values in found.items()}
    reference = torch.tensor(images.labels)[images.train_indices]
    lines = ["Classes that the classifier names, against those of the training images: total variation of the shares"]
    for name in ("samples", "validation images"):
        shift, error = class_shift(named[name], reference)
        key = name.split()[0]
        figures[f"class_shift_{key}"], figures[f"class_shift_{key}_standard_error"] = shift, error
        lines.append(f"  {name:18} {shift:.3f} +- {error:.3f}")
    figures["classifier_val_accuracy"] = classifier.val_accuracy
    if isinstance(of_class, ClassCondition):
        share, error = class_accuracy(classifier, kept, torch.tensor(images.labels)[own])
        figures["class_accuracy_samples"], figures["class_accuracy_samples_standard_error"] = share, error
        lines.append(
            f"  the class that was asked for: {share:.1%} +- {error:.1%} of the samples; of the validation images "
            f"it names {classifier.val_accuracy:.1%}"
        )
    return lines


def _memorisation(found: Memorisation, images: ImageData, figures: dict[str, Any]) -> list[str]:
    """Are samples nearer to training images than new images are?"""
    num = len(found.validation_distances)
    medians = [part.median().item() for part in (found.distances, found.validation_distances)]
    figures |= {
        "close_threshold": found.threshold,
        "close_share_samples": found.close_share,
        "close_share_samples_standard_error": found.close_share_standard_error,
        "nearest_distance_median_samples": medians[0],
        "nearest_distance_median_validation": medians[1],
        "closest_pairs": [
            {
                "sample": i,
                "training_image": images.names[int(images.train_indices[int(found.nearest[i])])],
                "distance": found.distances[i].item(),
            }
            for i in found.closest.tolist()
        ],
    }
    share = f"{found.close_share:.1%} +- {found.close_share_standard_error:.1%}"
    lines = [
        f"Memorisation: {share} of the samples are nearer to a training image than {QUANTILE:.0%} of the {num}",
        f"  validation images are (cosine distance {found.threshold:.4f}); median distance {medians[0]:.3f}, of "
        f"validation images {medians[1]:.3f}. The closest pairs: nearest.png",
    ]
    if num < 1 / QUANTILE:
        lines.append(f"  {num} validation images are few for that percentile: it is nearly their smallest distance.")
    return lines
