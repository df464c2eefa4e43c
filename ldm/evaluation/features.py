"""Frozen features by name, of images in batches; those of a whole data set are kept."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ldm.data.images import ImageData
from ldm.errors import UserError
from ldm.evaluation.classifier import Classifier, load_classifier
from ldm.files.atomic import durable_file
from ldm.files.untrusted import read_array
from ldm.metrics.features import CHOICES, HUB_IDS
from ldm.progress import track

NO_FEATURES = "none"


class ImageSet(Protocol):
    """Images that are made or read as they are asked for."""

    def __len__(self) -> int: ...

    def batch(self, indices: Any) -> Tensor: ...


def load_features(name: str, images: ImageData | None = None, path: str | None = None) -> nn.Module:
    """Frozen features by name; with `images` also those of a classifier that is trained on them.

    Args:
        path: Folder or hub id of the weights, for those of `HUB_IDS`.

    Raises:
        UserError: unknown, a path for what takes none, or what the network itself refuses.
    """
    if path is not None and name not in HUB_IDS:
        raise UserError(f"features_path={path} is for features={' or '.join(HUB_IDS)}; features={name} takes none.")
    choices = CHOICES if images is None else {**CHOICES, Classifier.name: lambda: load_classifier(images)}
    if name not in choices:
        raise UserError(f"features={name} is unknown. Choose one of: {', '.join(choices)}.")
    return choices[name](path) if name in HUB_IDS else choices[name]()


def describe_features(network: nn.Module, name: str) -> dict[str, str | None]:
    """For a report: the name, the key and the library of features, without which a distance means nothing.

    The key is the network's name, a digest of its weights and the size that images are brought to.
    """
    key, library = getattr(network, "key", name), getattr(network, "library", None)
    return {"features": name, "features_key": key, "features_library": library}


def feature_title(content: Mapping[str, Any]) -> str:
    """Features of `describe_features` in words: name, weights, size, library."""
    library = content["features_library"]
    return content["features_key"] + (f" ({library})" if library else "")


def extract(network: nn.Module, images: Tensor | ImageSet, title: str, batch_size: int = 64) -> Tensor:
    """Features of images [N, 3, H, W], or of a whole set, a batch at a time; with a progress bar."""
    device = next(network.parameters()).device
    parts = []
    with torch.no_grad():
        for start in track(range(0, len(images), batch_size), title):
            rows = range(start, min(start + batch_size, len(images)))
            part = images[rows.start : rows.stop] if isinstance(images, Tensor) else images.batch(rows)
            parts.append(network(part.to(device)).float().cpu())
    return torch.cat(parts)


def reference_features(network: nn.Module, name: str, images: ImageData) -> Tensor:
    """Features of every image of a data set, computed once and kept in its cache folder.

    Under the network's key and the data's fingerprint.
    """
    key = describe_features(network, name)["features_key"]
    file = images.path / f"features-{key}-{images.fingerprint[:8]}.npy"
    if not file.is_file():
        found = extract(network, images, f"features of {images.name}")
        with durable_file(file) as partial:
            np.save(partial, found.numpy())
    kept = read_array(file)
    if kept.ndim != 2 or len(kept) != len(images) or kept.dtype.kind != "f" or not np.isfinite(kept).all():
        raise UserError(
            f"{file} holds {kept.dtype} {kept.shape}, which are no finite features of {len(images)} images. Delete it; "
            "it is made again."
        )
    return torch.from_numpy(np.array(kept))
