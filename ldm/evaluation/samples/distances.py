"""One table: how far sets of images are from the training images, every row by the same measures."""

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
from ldm.metrics.subsets import MOST_COMPONENTS, NUM_GROUPS, NUM_SUBSETS, jackknife_error, over_subsets
from ldm.rules import Whole
from ldm.runtime.random import numpy_generator

COLUMNS = {"fd": 2, "kd": 4, "precision": 3, "recall": 3, "density": 3, "coverage": 3, "cmmd": 3}
"""Metrics by name, with the digits that are shown."""
Enough = Annotated[Whole, Field(ge=2 * NUM_SUBSETS)]
"""Images of which a distance and its error can be told."""


@dataclass(frozen=True)
class Measures:
    """What every row of one table is measured by.

    Args:
        train: Features of the training images, [n, d].
        components: Mean and basis of the PCA form of the Fréchet distance; None: in all dimensions.
        with_cmmd: CMMD too, which is made for CLIP's embeddings.
    """

    train: Tensor
    components: tuple[Tensor, Tensor] | None
    with_cmmd: bool = False

    @classmethod
    def choose(
        cls, train: Tensor, num_samples: int, *, num_reference: int | None = None, with_cmmd: bool = False
    ) -> "Measures":
        """The Fréchet distance in all dimensions where samples and reference are 2 d each.

        Args:
            num_reference: None: half of the training images, as the floor has.
        """
        num, dim = min(num_samples, num_reference or len(train) // 2), train.shape[1]
        most = min(MOST_COMPONENTS, num // 2)
        return cls(train, None if num >= 2 * dim else feature_components(train, most), with_cmmd)

    @property
    def num_components(self) -> int | None:
        return None if self.components is None else self.components[1].shape[1]

    def num_per_subset(self, features: Tensor, reference: Tensor | None = None) -> int:
        """Of either set: all that precision, recall, density and coverage see at a time."""
        return min(len(features), len(self.train if reference is None else reference)) // NUM_SUBSETS

    def of(self, features: Tensor, reference: Tensor | None = None) -> dict[str, Metric]:
        """Metrics by name of `COLUMNS`; UNMEASURED where a set is too small for one.

        Args:
            reference: Instead of all training images.
        """
        return {"fd": self.fd(features, reference), **self.by_subsets(features, reference)}

    def fd(self, features: Tensor, reference: Tensor | None = None, *, paired: bool = False) -> Metric:
        """The Fréchet distance; `paired` as in `frechet_replicates`."""
        found = self.frechet(features, reference, paired=paired)
        return UNMEASURED if found is None else Metric(found[0], jackknife_error(found[1]))

    def kd(self, features: Tensor, reference: Tensor | None = None, *, paired: bool = False) -> Metric:
        """The kernel distance; `paired` as in `kernel_distance`."""
        if self.num_per_subset(features, reference) < 2:
            return UNMEASURED
        return Metric(*kernel_distance(features, self.train if reference is None else reference, paired=paired))

    def by_subsets(self, features: Tensor, reference: Tensor | None = None) -> dict[str, Metric]:
        """All of them but the Fréchet distance."""
        size, reference = self.num_per_subset(features, reference), self.train if reference is None else reference
        found = {"kd": self.kd(features, reference)}
        for names, metric, smallest in (
            (("precision", "recall"), precision_recall, 4),
            (("density", "coverage"), lambda a, b: density_coverage(b, a), 6),
        ):
            values = over_subsets(metric, features, reference) if size >= smallest else None
            found |= {name: Metric(*values[i]) if values else UNMEASURED for i, name in enumerate(names)}
        if self.with_cmmd:
            parts = over_subsets(lambda a, b: (cmmd(a, b),), features, reference) if size else ()
            found["cmmd"] = Metric(cmmd(features, reference), parts[0][1]) if parts else UNMEASURED
        return found

    def frechet(
        self, features: Tensor, reference: Tensor | None = None, *, paired: bool = False
    ) -> tuple[float, Tensor] | None:
        """The distance and its jackknife replicates; None where a set is too small for it."""
        reference = self.train if reference is None else reference
        if self.components is not None:
            mean, basis = self.components
            features, reference = ((part.double() - mean) @ basis for part in (features, reference))
        if min(len(features), len(reference)) < max(4, 2 * features.shape[1]):
            return None
        num_groups = min(NUM_GROUPS, len(features) // 2)
        return frechet_replicates(features, reference, num_groups=num_groups, paired=paired)


def describe_setting(network: nn.Module, features: str, images: ImageData) -> dict[str, Any]:
    """For a report: which features are compared, and with which images."""
    reference = {"reference": f"{images.name}/train@{images.fingerprint[:8]}"}
    return {**describe_features(network, features), **reference, "num_reference": len(images.train_indices)}


def fd_name(network: nn.Module, num_components: int | None) -> str:
    """FID only of the features that it is defined for, in all dimensions."""
    if num_components is not None:
        return f"FD on {num_components} components"
    return "FID" if getattr(network, "is_fid", False) else "FD"


def halves(train: Tensor, num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Disjoint training images: as many as there are samples, half of all at most, and all others."""
    order = torch.from_numpy(numpy_generator(seed).permutation(len(train)))
    num = min(num_samples, len(train) // 2)
    return train[order[:num]], train[order[num:]]


def distance_table(rows: Mapping[str, tuple[int, int, Mapping[str, Metric]]], fd_name: str = "FD") -> list[str]:
    """Lines of text, with value +- standard error; rows are (N, N of a subset, metrics) by name."""
    names = [name for name in COLUMNS if any(name in found for *_, found in rows.values())]
    heads = {"fd": fd_name, "kd": "KD", "cmmd": "CMMD"}
    table = [["", "N", "subset", *(heads.get(name, name) for name in names)]]
    for row, (num, num_per_subset, found) in rows.items():
        cells = (f"{found.get(name, UNMEASURED):.{COLUMNS[name]}f}" for name in names)
        table.append([row, str(num), str(num_per_subset), *cells])
    return align(table)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text with the cells of a table below each other, the first of each row to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(["", first.ljust(widths[0]), *(map(str.rjust, cells, widths[1:]))]) for first, *cells in rows]
