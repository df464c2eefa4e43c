"""Frozen feature networks by name, feature extraction in batches, and a cache for the features of a data set."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ldm.data.images import ImageData
from ldm.errors import UserError
from ldm.evaluation.classifier import Classifier, load_classifier
from ldm.files.atomic import atomic_write
from ldm.files.untrusted import read_array
from ldm.metrics.features import FEATURE_NETWORKS, HUB_IDS
from ldm.progress import track

NO_FEATURES = "none"


class ImageSet(Protocol):
    """Images that are loaded or generated on demand."""

    def __len__(self) -> int: ...

    def batch(self, indices: Any) -> Tensor: ...


def load_features(name: str, images: ImageData | None = None, path: str | None = None) -> nn.Module:
    """Return a frozen feature network by name.

    Args:
        images: Data set to train the classifier on. If None, `features=classifier` is unavailable.
        path: Folder or hub id of the weights, for the networks in `HUB_IDS`.

    Raises:
        UserError: If the name is unknown, the network does not accept a path, or loading fails.
    """
    if path is not None and name not in HUB_IDS:
        raise UserError(
            f"features_path={path} applies only to features={' or '.join(HUB_IDS)}, not to features={name}. Remove it."
        )
    choices = dict(FEATURE_NETWORKS)
    if images is not None:
        choices[Classifier.name] = lambda: load_classifier(images)
    if name not in choices:
        raise UserError(f"features={name} is unknown. Choose one of: {', '.join(choices)}.")
    return choices[name](path) if name in HUB_IDS else choices[name]()


def describe_features(network: nn.Module, name: str) -> dict[str, str | None]:
    """Return the name, key and library of a feature network, for a report.

    Distances are comparable only if the name, key and library are equal. The key combines the network's name, a digest
    of its weights and its input size.
    """
    key, library = getattr(network, "key", name), getattr(network, "library", None)
    return {"features": name, "features_key": key, "features_library": library}


def feature_title(content: Mapping[str, Any]) -> str:
    """Format the key and library returned by `describe_features`."""
    library = content["features_library"]
    return content["features_key"] + (f" ({library})" if library else "")


def extract(network: nn.Module, images: Tensor | ImageSet, title: str, batch_size: int = 64) -> Tensor:
    """Extract the features of images [N, 3, H, W] or of an image set in batches, with a progress bar."""
    device = next(network.parameters()).device
    batches = []
    with torch.no_grad():
        for start in track(range(0, len(images), batch_size), title):
            rows = range(start, min(start + batch_size, len(images)))
            batch = images[rows.start : rows.stop] if isinstance(images, Tensor) else images.batch(rows)
            batches.append(network(batch.to(device)).float().cpu())
    return torch.cat(batches)


def reference_features(network: nn.Module, name: str, images: ImageData) -> Tensor:
    """Return the features of all images in a data set, cached by network key and data fingerprint."""
    key = describe_features(network, name)["features_key"]
    file = images.path / f"features-{key}-{images.fingerprint[:8]}.npy"
    if not file.is_file():
        features = extract(network, images, f"features of {images.name}")
        with atomic_write(file) as partial:
            np.save(partial, features.numpy())
    cached = read_array(file)
    if cached.ndim != 2 or len(cached) != len(images) or cached.dtype.kind != "f" or not np.isfinite(cached).all():
        raise UserError(
            f"{file} contains {cached.dtype} {cached.shape} instead of finite features [{len(images)}, d] for the "
            f"{len(images)} images. Delete the file to recompute them."
        )
    return torch.from_numpy(np.array(cached))
