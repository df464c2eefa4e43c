"""Features that no training loss has seen: those of a small classifier of a data set's own classes.

A distance in the features that a perceptual loss was trained on says little about that loss. These are learned from
the labels alone, by the training split alone, and kept beside the prepared images. It knows the training images better
than others, so a distance from validation to training images holds its overfitting too; one between validation images
and their reconstructions does not.
"""

import json
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.data.images import ImageData
from ldm.data.order import batch_at
from ldm.errors import UserError
from ldm.files.atomic import durable_file, write_text
from ldm.files.digest import sha256_of_values
from ldm.files.untrusted import check_fields, first_line, read_json
from ldm.metrics.features import weights_digest
from ldm.metrics.subsets import NUM_GROUPS, jackknife_error
from ldm.progress import track
from ldm.runtime.random import derive_seed, torch_generator

FORMAT = 1
"""Of the architecture, the recipe and the files: another number trains again."""
NUM_STEPS, BATCH_SIZE, PEAK_LR, WEIGHT_DECAY = 1000, 256, 1e-2, 0.05
MOST_PIXELS = 64


class Classifier(nn.Module):
    """A convolutional classifier whose penultimate layer gives features: [b, 3, H, W] in [-1, 1] -> [b, 64].

    Images of more than 64 px are resized to 64 (bilinear, antialiased); H and W are even.
    """

    name = "classifier"
    library = "ldm"
    dim = 64

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.key = self.name
        """What its features are kept under: the classifier of these images, this split and this seed, its weights."""
        self.val_accuracy: float | None = None
        """Share of the validation images whose class it names."""
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(2),
            _convolution(12, 32),
            _convolution(32, 64, stride=2),
            _convolution(64, 64),
            _convolution(64, 128, stride=2),
            _convolution(128, self.dim),
        )
        self.head = nn.Linear(self.dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] > MOST_PIXELS:
            images = F.interpolate(images, size=MOST_PIXELS, mode="bilinear", antialias=True)
        return self.layers(images).mean(dim=(2, 3))

    def logits(self, images: Tensor) -> Tensor:
        """[b, num_classes]."""
        return self.head(self(images))


def _convolution(channels: int, out: int, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU())


def load_classifier(images: ImageData, *, seed: int = 0, num_steps: int = NUM_STEPS) -> Classifier:
    """The classifier of a data set, frozen: read from its cache folder, or trained and kept there.

    Its files are features-classifier-<digest>.safetensors and .json, which says how it was made and what it is worth.

    Raises:
        UserError: images without class labels, or all of one class.
    """
    labels = _labels(images)
    data = {"data_fingerprint": images.fingerprint, "val_fraction": images.val_fraction}
    made_from: dict[str, Any] = {"format": FORMAT, **data, "seed": seed, "num_steps": num_steps}
    made_from["num_classes"] = int(labels.max()) + 1
    digest = sha256_of_values(made_from)[:8]
    classifier, name = Classifier(made_from["num_classes"]), f"{Classifier.name}-{digest}"
    weights, facts = (images.path / f"features-{name}{end}" for end in (".safetensors", ".json"))
    if weights.is_file():
        try:
            classifier.load_state_dict(load_file(weights))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(
                f"{weights} cannot be read ({first_line(error)}). Delete it; it is trained again."
            ) from error
        known = read_json(facts)
        check_fields(known, {"val_accuracy": float}, facts)
        classifier.val_accuracy = known["val_accuracy"]
    else:
        fit_classifier(classifier, images, labels, seed=seed, num_steps=num_steps)
        classifier.val_accuracy = accuracy(classifier, images, labels, images.val_indices)
        figures = {**made_from, "val_accuracy": classifier.val_accuracy, "num_val": len(images.val_indices)}
        write_text(facts, json.dumps(figures, indent=2) + "\n")
        with durable_file(weights) as partial:  # last: where the weights are, the facts are too
            save_file(classifier.state_dict(), partial)
    classifier.key = f"{name}-{weights_digest(classifier)}-{min(images.resolution, MOST_PIXELS)}px"
    return classifier.eval().requires_grad_(False)


def _labels(images: ImageData) -> Tensor:
    missing = len(images) if images.labels is None else images.labels.count(None)
    labels = torch.tensor([] if missing else images.labels)
    if missing or len(labels[images.train_indices].unique()) < 2:
        raise UserError(
            f"features=classifier is trained on two classes at least, and {missing} of the {len(images)} images of "
            f"{images.name} have none, or all have the same. Choose features=efficientnet_lite."
        )
    return labels


def fit_classifier(classifier: Classifier, images: ImageData, labels: Tensor, *, seed: int, num_steps: int) -> None:
    """Fit it to the training split: cross-entropy, AdamW, a linear warm-up and a cosine to zero.

    On the CPU, so that every machine finds the same features. Weights and order depend on the seed alone.
    """
    generator = torch_generator(seed, 1)
    for layer in classifier.modules():
        if isinstance(layer, nn.Conv2d):  # He's normal initialisation, arXiv:1502.01852
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
    nn.init.zeros_(classifier.head.weight)
    nn.init.zeros_(classifier.head.bias)
    indices, order = images.train_indices, derive_seed(seed, 2)
    batch_size = min(BATCH_SIZE, len(indices))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    warm_up = max(1, num_steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * k / num_steps))
    )
    network: Any = classifier.train()
    network.to(memory_format=torch.channels_last)  # 1.4 times as fast on a CPU
    for step in track(range(num_steps), "training a classifier"):
        chosen = indices[batch_at(step, size=len(indices), batch_size=batch_size, seed=order)]
        loss = F.cross_entropy(classifier.logits(images.batch(chosen)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval().to(memory_format=torch.contiguous_format)


@torch.no_grad()
def accuracy(classifier: Classifier, images: ImageData, labels: Tensor, indices: np.ndarray) -> float:
    """Share of these images whose class it names."""
    starts = range(0, len(indices), BATCH_SIZE)
    named = [classifier.logits(images.batch(indices[i : i + BATCH_SIZE])).argmax(1) for i in starts]
    return (torch.cat(named) == labels[indices]).double().mean().item()


def class_accuracy(named: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of `named_classes` [n] that are the class that was asked for, [n], and sqrt(p (1 - p) / n)."""
    share = (named == labels).double().mean().item()
    return share, math.sqrt(share * (1 - share) / len(named))


@torch.no_grad()
def named_classes(classifier: Classifier, features: Tensor) -> Tensor:
    """The class that it names by its own features, [n, d] -> [n]."""
    return classifier.head(features.to(classifier.head.weight.device)).argmax(1).cpu()


def class_shift(named: Tensor, reference: Tensor, *, num_groups: int = NUM_GROUPS) -> tuple[float, float]:
    """How far the shares of the classes are from those of a reference: their total variation, and its standard error.

        TV = 1/2 sum_c |p_c - q_c|,   from 0 to 1

    The error is a jackknife's over groups of the samples. Of equal shares TV is above 0 by the noise of counting.

    Args:
        named, reference: Classes, [n] and [m], both as a classifier names them: what it takes for another it takes so
            in both.
    """
    num_classes = int(torch.cat([named, reference]).max()) + 1
    shares = reference.bincount(minlength=num_classes).double() / len(reference)
    group = torch.arange(len(named)) % num_groups
    counts = torch.stack([named[group == i].bincount(minlength=num_classes) for i in range(num_groups)]).double()

    def distance(counted: Tensor) -> Tensor:
        return (counted / counted.sum(-1, keepdim=True) - shares).abs().sum(-1) / 2

    return distance(counts.sum(0)).item(), jackknife_error(distance(counts.sum(0) - counts))
