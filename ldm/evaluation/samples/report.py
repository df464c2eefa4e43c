"""How good the samples are, in numbers that name their features, N and reference set."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.images import ImageData
from ldm.diffusion.samplers.base import SamplerLike
from ldm.errors import UserError
from ldm.evaluation.classifier import Classifier, class_accuracy, class_shift, named_classes
from ldm.evaluation.features import ImageSet, extract, feature_title, load_features, reference_features
from ldm.evaluation.image_sets import Reconstructions, VAEAlone
from ldm.evaluation.samples import distances, retrieval
from ldm.evaluation.samples.distances import Enough, Measures
from ldm.evaluation.samples.kept import chosen_rows, draw_and_keep
from ldm.evaluation.samples.memorisation import Memorisation, nearest_training, plot_nearest
from ldm.files.untrusted import read_json
from ldm.metrics.metric import Metric
from ldm.metrics.report import Report
from ldm.rules import Count, Seed, checked
from ldm.runs.run import EVALUATION_FILE
from ldm.sampling.draw import Guidance, Interval, describe
from ldm.sampling.pipeline import LatentDiffusionPipeline


def save_unless_smaller(report: Report, folder: Path, elsewhere: Path) -> Path:
    """Save a report in `folder`, or as `elsewhere` where that holds metrics of more samples of the same weights.

    A file that cannot be read holds none. Returns where its JSON is.
    """
    known: dict[str, Any] = {}
    with suppress(UserError):
        known = read_json(folder / report.name)
    same, num = known.get("weights_sha256") == report.content["weights_sha256"], known.get("num_samples")
    if same and isinstance(num, int) and num > report.content["num_samples"]:
        report, folder = replace(report, name=elsewhere.name), elsewhere.parent
    return report.save(folder)[0]


@checked
def measure_samples(
    pipeline: LatentDiffusionPipeline,
    images: ImageData,
    sampler: SamplerLike,
    folder: Path,
    *,
    features: str = "efficientnet_lite",
    features_path: str | None = None,
    num_samples: Enough = 256,
    guidance: Guidance = 3.0,
    guidance_interval: Interval = (0.0, 1.0),
    seed: Seed = 0,
    batch_size: Count = 64,
    weights_sha256: str | None = None,
) -> Report:
    """Compare samples for seed-drawn training captions with the training images.

    Of a model of text, samples for the captions of validation images too, which training never saw. Beside them stand
    the autoencoder's reconstructions of the same images (the best that its decoder can show), the autoencoder as a
    generator of its own (z_raw ~ N(0, I) decoded, what a VAE without the chain would draw), the validation images (what
    new images of this kind look like), training images against the others (the floor: what the metrics say of one
    distribution), and for retrieval chance.

    Args:
        features_path: Folder or hub id of the features' weights.
        folder: Where samples are kept as they are drawn, and are looked for first.
        weights_sha256: By which the run names its weights, written beside the metrics.

    Raises:
        UserError: what `load_features` and `draw_and_keep` refuse.
    """
    network = load_features(features, images, features_path).to(pipeline.device)
    options: Any = {"guidance": guidance, "guidance_interval": guidance_interval, "seed": seed}
    draw = partial(draw_and_keep, pipeline, images, sampler, folder, batch_size=batch_size, **options)
    kept = draw(num_samples=num_samples)
    content: dict[str, Any] = {
        "weights_sha256": weights_sha256,
        **distances.describe_setting(network, features, images),
        "num_samples": num_samples,
        "sampler": describe(sampler),
        **options,
        "network_evaluations_per_sample": kept.evaluations,
        "seconds_per_sample": kept.seconds,
    }
    reference = reference_features(network, features, images)
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
        lines += retrieval.training_retrieval(ours, train, torch.from_numpy(chosen), content)
        if (num_held_out := min(num_samples, len(validation))) >= 2:
            rows = chosen_rows(images.val_indices, num_held_out, seed)
            sets = {
                "samples": draw(num_samples=num_held_out, split="val"),
                "reconstructions": Reconstructions(pipeline, images, images.val_indices[rows]),
            }
            theirs = {name: extract(network, part, f"held-out {name}", batch_size) for name, part in sets.items()}
            answered = validation, train, torch.from_numpy(rows), images, pipeline.conditioning
            lines += retrieval.held_out_retrieval(theirs, *answered, content)
    memorisation = nearest_training(found["samples"], train, validation)
    lines += _memorisation(memorisation, images, content)
    pictures = {"nearest.png": plot_nearest(kept, images, memorisation)}
    return Report(EVALUATION_FILE, content, lines=lines, pictures=pictures)


def _distances(network: nn.Module, found: Mapping[str, Tensor], train: Tensor, content: dict[str, Any]) -> list[str]:
    """Every set in one table, and the floor."""
    features, reference = content["features"], content["reference"]
    measures = Measures.choose(train, len(found["samples"]), with_cmmd=features == "clip")
    rows = {name: (len(values), measures.num_per_subset(values), measures.of(values)) for name, values in found.items()}
    some, others = distances.halves(train, len(found["samples"]), content["seed"])
    rows["floor, train to train"] = (len(some), measures.num_per_subset(some, others), measures.of(some, others))
    components = content["fd_components"] = measures.num_components
    content["fd_name"] = distances.fd_name(network, components)
    for name, (num, num_per_subset, values) in rows.items():
        key = name.split()[0].lower().rstrip(",")
        content[f"num_{key}"], content[f"num_per_subset_{key}"] = num, num_per_subset
        content |= {f"{measure}_{key}": values[measure] for measure in distances.COLUMNS if measure in values}
    form = "" if components is None else f", FD on {components} PCA components of {reference}"
    return [
        f"{feature_title(content)}{form}, ref={reference}, N={len(train)}; floor: {len(some)} of these "
        f"against the other {len(others)}:",
        *distances.distance_table(rows, content["fd_name"]),
        "  +- is a standard error of drawing other images. Compare rows of one N only: docs/reading_the_numbers.md",
    ]


def _classes(
    classifier: Classifier, found: Mapping[str, Tensor], train: Tensor, asked: Tensor | None, content: dict[str, Any]
) -> list[str]:
    """Are all classes drawn, and where one was asked for, that one?"""
    rows = []
    for name in ("samples", "validation images"):
        shift = Metric(*class_shift(named_classes(classifier, found[name]), named_classes(classifier, train)))
        content[f"class_shift_{name.split()[0]}"] = shift
        rows.append([name, f"{shift:.3f}"])
    content["classifier_val_accuracy"] = classifier.val_accuracy
    if asked is not None:
        share = Metric(*class_accuracy(named_classes(classifier, found["samples"]), asked))
        content["class_accuracy_samples"] = share
        rows.append(["the class that was asked for, samples", f"{share:.1%}"])
        rows.append(["the same, validation images", f"{classifier.val_accuracy:.1%}"])
    head = "Classes that the classifier names, against those it names of the training images: total variation"
    return [head, *distances.align(rows)]


def _memorisation(found: Memorisation, images: ImageData, content: dict[str, Any]) -> list[str]:
    """Are samples nearer to training images than new images are?"""
    share = Metric(found.close_share, found.close_share_standard_error)
    medians = [part.median().item() for part in (found.distances, found.validation_distances)]
    content |= {
        "close_threshold": found.threshold,
        "close_share_samples": share,
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
    return [
        f"Memorisation: {share:.1%} of the samples are nearer to a training image than {found.threshold:.4f}, the 1st "
        f"percentile of {len(found.validation_distances)} validation images",
        f"  (cosine distance); median {medians[0]:.3f}, of validation images {medians[1]:.3f}. The closest pairs: "
        "nearest.png",
    ]
