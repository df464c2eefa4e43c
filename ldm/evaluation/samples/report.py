"""Report on the quality of samples. Each metric is reported with its features, N and reference set."""

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
from ldm.evaluation.classifier import Classifier, class_accuracy, class_shift, predict_classes
from ldm.evaluation.features import ImageSet, extract, feature_title, load_features, reference_features
from ldm.evaluation.image_sets import Reconstructions, VAEAlone
from ldm.evaluation.samples import distances, retrieval
from ldm.evaluation.samples.cache import condition_rows, draw_cached
from ldm.evaluation.samples.distances import Measures, SampleCount
from ldm.evaluation.samples.memorisation import Memorisation, nearest_training, plot_nearest
from ldm.files.untrusted import read_json
from ldm.metrics.metric import Metric
from ldm.metrics.report import Report
from ldm.rules import Count, Seed, checked
from ldm.runs.run import EVALUATION_FILE
from ldm.sampling.draw import Guidance, GuidanceInterval, sampler_settings
from ldm.sampling.pipeline import LatentDiffusion


def save_unless_smaller(report: Report, folder: Path, fallback_file: Path) -> Path:
    """Save a report in `folder`, or as `fallback_file` if `folder` contains a report on more samples.

    Unreadable reports and reports for different weights are always replaced. Return the path of the JSON file.
    """
    existing: dict[str, Any] = {}
    with suppress(UserError):
        existing = read_json(folder / report.name)
    same_weights = existing.get("weights_sha256") == report.content["weights_sha256"]
    if same_weights and isinstance(num := existing.get("num_samples"), int) and num > report.content["num_samples"]:
        report, folder = replace(report, name=fallback_file.name), fallback_file.parent
    return report.save(folder)[0]


@checked
def measure_samples(
    pipeline: LatentDiffusion,
    images: ImageData,
    sampler: SamplerLike,
    folder: Path,
    *,
    features: str = "efficientnet_lite",
    features_path: str | None = None,
    num_samples: SampleCount = 256,
    guidance: Guidance = 3.0,
    guidance_interval: GuidanceInterval = (0.0, 1.0),
    seed: Seed = 0,
    batch_size: Count = 64,
    weights_sha256: str | None = None,
) -> Report:
    """Compare samples with the training images. The seed determines which training captions are used.

    Text-conditional models are also sampled with captions of validation images, which were not used in training.
    The report contains these baselines:

    - reconstructions of the images that the captions belong to, an upper bound on the quality of samples
    - VAE alone, the autoencoder as a generator: z_raw ~ N(0, I), decoded without the diffusion model
    - validation images, which are new images from the data distribution
    - floor: a random part of the training images compared with the rest, which come from the same distribution
    - chance, for retrieval

    Args:
        features_path: Folder or hub id of the feature network's weights.
        folder: Cache folder of the samples.
        weights_sha256: Digest of the run's weights, written to the report.

    Raises:
        UserError: As raised by `load_features` and `draw_cached`.
    """
    network = load_features(features, images, features_path).to(pipeline.device)
    options: Any = {"guidance": guidance, "guidance_interval": guidance_interval, "seed": seed}
    draw = partial(draw_cached, pipeline, images, sampler, folder, batch_size=batch_size, **options)
    samples = draw(num_samples=num_samples)
    content: dict[str, Any] = {
        "weights_sha256": weights_sha256,
        **distances.describe_setting(network, features, images),
        "num_samples": num_samples,
        "sampler": sampler_settings(sampler),
        **options,
        "network_evaluations_per_sample": samples.evaluations,
        "seconds_per_sample": samples.seconds,
    }
    reference = reference_features(network, features, images)
    train, validation = (reference[torch.from_numpy(rows)] for rows in (images.train_indices, images.val_indices))
    train_rows = condition_rows(images.train_indices, num_samples, seed)
    indices = images.train_indices[train_rows]
    sets: dict[str, ImageSet] = {
        "samples": samples,
        "reconstructions": Reconstructions(pipeline, images, indices[: len(train)]),
    }
    if pipeline.autoencoder.has_density:  # otherwise N(0, I) is not the prior of the latents
        sets["VAE alone"] = VAEAlone(pipeline, num_samples, seed)
    feature_sets = {name: extract(network, x, f"features of {name}", batch_size) for name, x in sets.items()}
    feature_sets["validation images"] = validation
    lines = _distances(network, feature_sets, train, content)
    if isinstance(network, Classifier):
        labels = torch.tensor(images.labels)[indices] if pipeline.conditioning.class_names is not None else None
        lines += _classes(network, feature_sets, train, labels, content)
    if pipeline.conditioning.text_dim is not None:
        queries = {name: feature_sets[name] for name in ("samples", "reconstructions")}
        lines += retrieval.training_retrieval(queries, train, torch.from_numpy(train_rows), content)
        if (num_held_out := min(num_samples, len(validation))) >= 2:
            rows = condition_rows(images.val_indices, num_held_out, seed)
            sets = {
                "samples": draw(num_samples=num_held_out, split="val"),
                "reconstructions": Reconstructions(pipeline, images, images.val_indices[rows]),
            }
            queries = {name: extract(network, items, f"held-out {name}", batch_size) for name, items in sets.items()}
            lines += retrieval.held_out_retrieval(
                queries, validation, train, torch.from_numpy(rows), images, pipeline.conditioning, content
            )
    memorisation = nearest_training(feature_sets["samples"], train, validation)
    lines += _memorisation(memorisation, images, content)
    figures = {"nearest.png": plot_nearest(samples, images, memorisation)}
    return Report(EVALUATION_FILE, content, lines=lines, figures=figures)


def _distances(network: nn.Module, sets: Mapping[str, Tensor], train: Tensor, content: dict[str, Any]) -> list[str]:
    """Add the distances of each set and of the floor to `content`, and return them as a table."""
    reference, with_cmmd = content["reference"], content["features"] == "clip"
    measures = Measures.choose(train, len(sets["samples"]), with_cmmd=with_cmmd)
    rows = {name: (len(x), measures.num_per_subset(x), measures.all(x)) for name, x in sets.items()}
    floor, floor_reference = distances.split_train(train, len(sets["samples"]), content["seed"])
    rows["floor, train vs train"] = (
        len(floor),
        measures.num_per_subset(floor, floor_reference),
        measures.all(floor, floor_reference),
    )
    components = content["fd_components"] = measures.num_components
    content["fd_name"] = distances.fd_name(network, components)
    for name, (num, num_per_subset, values) in rows.items():
        key = name.split()[0].lower().rstrip(",")
        content[f"num_{key}"], content[f"num_per_subset_{key}"] = num, num_per_subset
        content |= {f"{measure}_{key}": values[measure] for measure in distances.COLUMNS if measure in values}
    pca = "" if components is None else f", FD on {components} PCA components of {reference}"
    return [
        f"{feature_title(content)}{pca}, ref={reference}, N={len(train)}; floor: {len(floor)} of these "
        f"against the remaining {len(floor_reference)}:",
        *distances.distance_table(rows, content["fd_name"]),
        "  +- is the standard error over images. Compare only rows with equal N (see docs/evaluation.md).",
    ]


def _classes(
    classifier: Classifier, sets: Mapping[str, Tensor], train: Tensor, labels: Tensor | None, content: dict[str, Any]
) -> list[str]:
    """Add the class shift and, if the samples have labels, the class accuracy to `content`.

    Return both as a table.
    """
    rows = []
    for name in ("samples", "validation images"):
        shift = Metric(*class_shift(predict_classes(classifier, sets[name]), predict_classes(classifier, train)))
        content[f"class_shift_{name.split()[0]}"] = shift
        rows.append([name, f"{shift:.3f}"])
    content["classifier_val_accuracy"] = classifier.val_accuracy
    if labels is not None:
        accuracy = Metric(*class_accuracy(predict_classes(classifier, sets["samples"]), labels))
        content["class_accuracy_samples"] = accuracy
        rows.append(["accuracy, samples", f"{accuracy:.1%}"])
        rows.append(["accuracy, validation images", f"{classifier.val_accuracy:.1%}"])
    header = "Predicted classes: total variation distance to the training images' classes, and accuracy"
    return [header, *distances.align(rows)]


def _memorisation(memorisation: Memorisation, images: ImageData, content: dict[str, Any]) -> list[str]:
    """Add the distances between samples and training images to `content`, and return a summary."""
    share = Metric(memorisation.close_share, memorisation.close_share_standard_error)
    medians = [values.median().item() for values in (memorisation.distances, memorisation.validation_distances)]
    content |= {
        "close_threshold": memorisation.threshold,
        "close_share_samples": share,
        "nearest_distance_median_samples": medians[0],
        "nearest_distance_median_validation": medians[1],
        "closest_pairs": [
            {
                "sample": i,
                "training_image": images.names[int(images.train_indices[int(memorisation.nearest_rows[i])])],
                "distance": memorisation.distances[i].item(),
            }
            for i in memorisation.closest_samples.tolist()
        ],
    }
    return [
        f"Memorisation: {share:.1%} of the samples are closer to a training image than {memorisation.threshold:.4f} "
        f"(cosine distance), the 1st percentile over {len(memorisation.validation_distances)} validation images.",
        f"  Median distance: samples {medians[0]:.3f}, validation images {medians[1]:.3f}. Closest pairs: nearest.png",
    ]
