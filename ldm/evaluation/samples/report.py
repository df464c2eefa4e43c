"""How good the samples are, in numbers that name their features, N and reference set."""

import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from scipy import stats
from torch import Tensor, nn

from ldm.data.images import ImageData
from ldm.diffusion.samplers.base import SamplerLike
from ldm.errors import UserError, require_whole
from ldm.evaluation.classifier import Classifier, class_accuracy, class_shift, named_classes
from ldm.evaluation.evaluation_file import metrics_to_json
from ldm.evaluation.features import ImageSet, describe_features, extract, load_features, reference_features
from ldm.evaluation.image_sets import Reconstructions, VAEAlone
from ldm.evaluation.samples import retrieval as prompt_fidelity
from ldm.evaluation.samples.distances import COLUMNS, Measures, distance_table, fd_name, halves
from ldm.evaluation.samples.kept import KeptSamples, chosen_rows, draw_and_keep
from ldm.evaluation.samples.memorisation import QUANTILE, Memorisation, nearest_training, plot_nearest
from ldm.files.atomic import durable_file, write_text
from ldm.files.untrusted import read_json
from ldm.metrics.metric import Metric
from ldm.metrics.subsets import NUM_GROUPS, NUM_SUBSETS
from ldm.sampling.draw import check_interval, describe
from ldm.sampling.pipeline import LatentDiffusionPipeline

FLOOR = "floor, train to train"
FEWEST = 2 * NUM_SUBSETS
"""Images of which a distance and its error can be told."""


@dataclass(frozen=True)
class SampleReport:
    """Metrics and their settings by name, lines that explain them, pictures by file name."""

    content: dict[str, Any]
    lines: list[str]
    pictures: dict[str, Image.Image] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return metrics_to_json(self.content)

    def save(self, path: Path) -> None:
        """The metrics at `path`, the pictures beside it."""
        for name, picture in self.pictures.items():
            with durable_file(path.with_name(name)) as partial:
                picture.save(partial)
        write_text(path, json.dumps(self.to_json(), indent=2) + "\n")

    def save_unless_smaller(self, path: Path, elsewhere: Path) -> Path:
        """At `path`; `elsewhere` where that holds metrics of more samples of the same weights. Returns which.

        A file that cannot be read holds none.
        """
        known: dict[str, Any] = {}
        with suppress(UserError):
            known = read_json(path)
        num, same = known.get("num_samples"), known.get("weights_sha256") == self.content["weights_sha256"]
        larger = same and isinstance(num, int) and num > self.content["num_samples"]
        chosen = elsewhere if larger else path
        self.save(chosen)
        return chosen


def measure_samples(
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
    weights_sha256: str | None = None,
) -> SampleReport:
    """Compare samples for seed-drawn training captions with the training images.

    Of a model of text, samples for the captions of validation images too, which training never saw.

    Args:
        features_path: Folder or hub id of the features' weights.
        folder: Where samples are kept as they are drawn, and are looked for first; None keeps none.
        weights_sha256: By which the run names its weights, written beside the metrics.

    Raises:
        UserError: numbers that are none, what `load_features` and `draw_and_keep` refuse.
    """
    require_whole("num_samples", num_samples, FEWEST)
    require_whole("batch_size", batch_size, 1)
    if len(images.train_indices) < FEWEST:
        raise UserError(f"{images.name} has {len(images.train_indices)} training images; distances need {FEWEST}.")
    network = load_features(features, images, features_path).to(pipeline.device)
    content: dict[str, Any] = {
        "weights_sha256": weights_sha256,
        **describe_features(network, features),
        "num_samples": num_samples,
        "reference": f"{images.name}/train@{images.fingerprint[:8]}",
        "num_reference": len(images.train_indices),
        "guidance": guidance,
        "guidance_interval": check_interval(guidance_interval),
        "sampler": describe(sampler),
        "seed": seed,
    }
    options: dict[str, Any] = {"guidance": guidance, "guidance_interval": guidance_interval, "seed": seed}
    with ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        draw = partial(draw_and_keep, pipeline, images, sampler, place, batch_size=batch_size, **options)
        return _compare_sets(pipeline, images, network, draw, content, batch_size)


def _compare_sets(
    pipeline: LatentDiffusionPipeline,
    images: ImageData,
    network: nn.Module,
    draw: Callable[..., KeptSamples],
    content: dict[str, Any],
    batch_size: int,
) -> SampleReport:
    """Draw samples and measure them beside their anchors.

    The anchors: the autoencoder's reconstructions of the same images (the best that its decoder can show), the
    autoencoder as a generator of its own (z_raw ~ N(0, I) decoded, what a VAE without the chain would draw), the
    validation images (what new images of this kind look like), training images against the others (the floor: what
    the metrics say of one distribution), and for retrieval chance.
    """
    num_samples, seed = content["num_samples"], content["seed"]
    kept = draw(num_samples=num_samples)
    content |= {"network_evaluations_per_sample": kept.evaluations, "seconds_per_sample": kept.seconds}
    reference = reference_features(network, content["features"], images)
    train, validation = (reference[torch.from_numpy(rows)] for rows in (images.train_indices, images.val_indices))
    chosen = chosen_rows(images.train_indices, num_samples, seed)
    own = images.train_indices[chosen]
    sets: dict[str, ImageSet] = {
        "samples": kept,
        "reconstructions": Reconstructions(pipeline, images, own[: len(train)]),
    }
    if pipeline.autoencoder.has_density:  # a codebook or a point has no N(0, I) to draw from
        sets["VAE alone"] = VAEAlone(pipeline, num_samples, seed)
    found = {name: extract(network, part, f"features of {name}", batch_size) for name, part in sets.items()}
    found["validation images"] = validation
    lines = _distances(network, found, train, content)
    if isinstance(network, Classifier):
        asked = torch.tensor(images.labels)[own] if pipeline.conditioning.class_names is not None else None
        lines += _classes(network, found, train, asked, content)
    if pipeline.conditioning.text_dim is not None:
        ours = {name: found[name] for name in ("samples", "reconstructions")}
        parts = [prompt_fidelity.training_retrieval(ours, train, torch.from_numpy(chosen), content["features_key"])]
        if (num_held_out := min(num_samples, len(validation))) >= 2:
            rows = chosen_rows(images.val_indices, num_held_out, seed)
            held_out: dict[str, ImageSet] = {
                "samples": draw(num_samples=num_held_out, split="val"),
                "reconstructions": Reconstructions(pipeline, images, images.val_indices[rows]),
            }
            theirs = {
                name: extract(network, part, f"features of held-out {name}", batch_size)
                for name, part in held_out.items()
            }
            answered = validation, train, torch.from_numpy(rows), images, pipeline.conditioning
            parts.append(prompt_fidelity.held_out_retrieval(theirs, *answered, content["features_key"]))
        for more, told in parts:
            content |= more
            lines += told
    memorisation = nearest_training(found["samples"], train, validation)
    lines += _memorisation(memorisation, images, content)
    return SampleReport(content, lines, {"nearest.png": plot_nearest(kept, images, memorisation)})


def _distances(network: nn.Module, found: Mapping[str, Tensor], train: Tensor, content: dict[str, Any]) -> list[str]:
    """Every set in one table, and the floor."""
    features, reference = content["features"], content["reference"]
    measures = Measures.choose(train, len(found["samples"]), with_cmmd=features == "clip")
    rows = {name: (len(values), measures.num_per_subset(values), measures.of(values)) for name, values in found.items()}
    some, others = halves(train, len(found["samples"]), content["seed"])
    rows[FLOOR] = (len(some), measures.num_per_subset(some, others), measures.of(some, others))
    components = content["fd_components"] = measures.num_components
    content["fd_name"] = fd_name(network, components)
    for name, (num, num_per_subset, values) in rows.items():
        key = name.split()[0].lower().rstrip(",")
        content[f"num_{key}"], content[f"num_per_subset_{key}"] = num, num_per_subset
        content |= {f"{measure}_{key}": values[measure] for measure in COLUMNS if measure in values}
    library = f" ({content['features_library']})" if content["features_library"] else ""
    form = "" if components is None else f", FD on {components} PCA components of {reference}"
    return [
        f"{content['features_key']}{library}{form}, ref={reference}, N={len(train)}; floor: {len(some)} of these "
        f"against the other {len(others)}:",
        *distance_table(rows, content["fd_name"]),
        "  +- is a standard error of drawing other images, not of training again. Compare rows of one N only.",
        f"  FD is of all N; its error, a jackknife's, has {NUM_GROUPS - 1} degrees of freedom (95 % within "
        f"{_half_width(NUM_GROUPS - 1):.1f} of them).",
        f"  The rest are means of {NUM_SUBSETS} disjoint subsets of both sides, so large as stands under `subset`"
        + (" (CMMD: of all N)" if measures.with_cmmd else "")
        + ";",
        f"  their errors have {NUM_SUBSETS - 1} degrees of freedom (95 % within {_half_width(NUM_SUBSETS - 1):.1f} of "
        "them).",
    ]


def _half_width(dof: int) -> float:
    """Of a 95 % interval, in standard errors of so many degrees of freedom."""
    return float(stats.t.ppf(0.975, dof))


def _classes(
    classifier: Classifier, found: Mapping[str, Tensor], train: Tensor, asked: Tensor | None, content: dict[str, Any]
) -> list[str]:
    """Are all classes drawn, and where one was asked for, that one?"""
    named = {name: named_classes(classifier, found[name]) for name in ("samples", "validation images")}
    reference = named_classes(classifier, train)
    lines = ["Classes that the classifier names, against those it names of the training images: total variation"]
    for name in named:
        shift, error = class_shift(named[name], reference)
        content[f"class_shift_{name.split()[0]}"] = Metric(shift, error, n=len(named[name]))
        lines.append(f"  {name:18} {shift:.3f} +- {error:.3f}")
    content["classifier_val_accuracy"] = classifier.val_accuracy
    if asked is not None:
        share, error = class_accuracy(named["samples"], asked)
        content["class_accuracy_samples"] = Metric(share, error, n=len(asked))
        lines.append(
            f"  the class that was asked for: {share:.1%} +- {error:.1%} of the samples; of the validation images "
            f"it names {classifier.val_accuracy:.1%}"
        )
    return lines


def _memorisation(found: Memorisation, images: ImageData, content: dict[str, Any]) -> list[str]:
    """Are samples nearer to training images than new images are?"""
    num = len(found.validation_distances)
    medians = [part.median().item() for part in (found.distances, found.validation_distances)]
    content |= {
        "close_threshold": found.threshold,
        "close_share_samples": Metric(found.close_share, found.close_share_standard_error, n=len(found.distances)),
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
