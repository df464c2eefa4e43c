"""Distances between sets of images and the training images, measured in the same way for every set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ldm.data.images import ImageData
from ldm.evaluation.features import describe_features
from ldm.metrics.frechet import feature_components, frechet_replicates
from ldm.metrics.kernel import cmmd, kernel_distance
from ldm.metrics.metric import UNMEASURED, Metric
from ldm.metrics.neighbours import density_coverage, precision_recall
from ldm.metrics.subsets import MAX_COMPONENTS, NUM_GROUPS, NUM_SUBSETS, jackknife_error, mean_over_subsets
from ldm.rules import Integer
from ldm.runtime.random import numpy_generator

COLUMNS = {"fd": 2, "kd": 4, "precision": 3, "recall": 3, "density": 3, "coverage": 3, "cmmd": 3}
"""Names of the metrics, with the number of decimals to print."""
SampleCount = Annotated[Integer, Field(ge=2 * NUM_SUBSETS)]
"""A number of images large enough for a distance and its standard error."""


@dataclass(frozen=True)
class Measures:
    """Metrics of image sets relative to a common reference set, the training images.

    Args:
        train: Features of the training images, [n, d].
        components: PCA mean and basis for the Fréchet distance; None uses all dimensions.
        with_cmmd: Also measure CMMD, which is defined on CLIP embeddings.
    """

    train: Tensor
    components: tuple[Tensor, Tensor] | None
    with_cmmd: bool = False

    @classmethod
    def choose(
        cls, train: Tensor, num_samples: int, *, num_reference: int | None = None, with_cmmd: bool = False
    ) -> "Measures":
        """Choose whether the Fréchet distance uses all d dimensions or principal components.

        All dimensions are used if both sets have at least 2 * d images.

        Args:
            num_reference: Size of the reference set; None means half of the training images, as used for
                the floor baseline.
        """
        num, dim = min(num_samples, num_reference or len(train) // 2), train.shape[1]
        num_components = min(MAX_COMPONENTS, num // 2)
        return cls(train, None if num >= 2 * dim else feature_components(train, num_components), with_cmmd)

    @property
    def num_components(self) -> int | None:
        return None if self.components is None else self.components[1].shape[1]

    def num_per_subset(self, features: Tensor, reference: Tensor | None = None) -> int:
        """Return the subset size for all metrics except the Fréchet distance, which uses full sets."""
        return min(len(features), len(self.train if reference is None else reference)) // NUM_SUBSETS

    def all(self, features: Tensor, reference: Tensor | None = None) -> dict[str, Metric]:
        """Measure all metrics in `COLUMNS`, by name. A metric is UNMEASURED if a set is too small.

        Args:
            reference: Features of the reference set; None uses all training images.
        """
        return {"fd": self.fd(features, reference), **self.subset_metrics(features, reference)}

    def fd(self, features: Tensor, reference: Tensor | None = None, *, paired: bool = False) -> Metric:
        """Measure the Fréchet distance. See `frechet_replicates` for `paired`."""
        result = self.frechet(features, reference, paired=paired)
        return UNMEASURED if result is None else Metric(result[0], jackknife_error(result[1]))

    def kd(self, features: Tensor, reference: Tensor | None = None, *, paired: bool = False) -> Metric:
        """Measure the kernel distance. See `kernel_distance` for `paired`."""
        if self.num_per_subset(features, reference) < 2:
            return UNMEASURED
        return Metric(*kernel_distance(features, self.train if reference is None else reference, paired=paired))

    def subset_metrics(self, features: Tensor, reference: Tensor | None = None) -> dict[str, Metric]:
        """Measure all metrics except the Fréchet distance."""
        size, reference = self.num_per_subset(features, reference), self.train if reference is None else reference
        metrics = {"kd": self.kd(features, reference)}
        for names, metric, min_size in (
            (("precision", "recall"), precision_recall, 4),
            (("density", "coverage"), lambda a, b: density_coverage(b, a), 6),
        ):
            values = mean_over_subsets(metric, features, reference) if size >= min_size else None
            metrics |= {name: Metric(*values[i]) if values else UNMEASURED for i, name in enumerate(names)}
        if self.with_cmmd:
            means = mean_over_subsets(lambda a, b: (cmmd(a, b),), features, reference) if size else ()
            metrics["cmmd"] = Metric(cmmd(features, reference), means[0][1]) if means else UNMEASURED
        return metrics

    def frechet(
        self, features: Tensor, reference: Tensor | None = None, *, paired: bool = False
    ) -> tuple[float, Tensor] | None:
        """Return the Fréchet distance and its jackknife replicates, or None if a set is too small."""
        reference = self.train if reference is None else reference
        if self.components is not None:
            mean, basis = self.components
            features, reference = ((rows.double() - mean) @ basis for rows in (features, reference))
        if min(len(features), len(reference)) < max(4, 2 * features.shape[1]):
            return None
        num_groups = min(NUM_GROUPS, len(features) // 2)
        return frechet_replicates(features, reference, num_groups=num_groups, paired=paired)


def describe_setting(network: nn.Module, features: str, images: ImageData) -> dict[str, Any]:
    """Return the feature network and reference set of a distance, for a report."""
    reference = {"reference": f"{images.name}/train@{images.fingerprint[:8]}"}
    return {**describe_features(network, features), **reference, "num_reference": len(images.train_indices)}


def fd_name(network: nn.Module, num_components: int | None) -> str:
    """Return the name of the Fréchet distance, which is "FID" only for Inception features in all dimensions."""
    if num_components is not None:
        return f"FD on {num_components} components"
    return "FID" if getattr(network, "is_fid", False) else "FD"


def split_train(train: Tensor, num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Randomly split the training images into `num_samples` images, at most half of them, and the rest."""
    order = torch.from_numpy(numpy_generator(seed).permutation(len(train)))
    num = min(num_samples, len(train) // 2)
    return train[order[:num]], train[order[num:]]


def distance_table(rows: Mapping[str, tuple[int, int, Mapping[str, Metric]]], fd_name: str = "FD") -> list[str]:
    """Return a table of metrics with their standard errors, as lines of text.

    Args:
        rows: For each set by name, the number of images, the number of images per subset, and the metrics.
    """
    names = [name for name in COLUMNS if any(name in metrics for *_, metrics in rows.values())]
    headers = {"fd": fd_name, "kd": "KD", "cmmd": "CMMD"}
    table = [["", "N", "subset", *(headers.get(name, name) for name in names)]]
    for row, (num, num_per_subset, metrics) in rows.items():
        cells = (f"{metrics.get(name, UNMEASURED):.{COLUMNS[name]}f}" for name in names)
        table.append([row, str(num), str(num_per_subset), *cells])
    return align(table)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines of text with aligned columns. All columns except the first are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(["", first.ljust(widths[0]), *(map(str.rjust, cells, widths[1:]))]) for first, *cells in rows]
