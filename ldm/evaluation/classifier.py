"""A small classifier trained on a data set's own labels. No training loss uses the classifier's features.

If a perceptual loss uses a feature network, distances between features of that network say little about quality. The
classifier is trained on the labels of the training split only, and cached next to the prepared images. It overfits to
the training images. The overfitting affects distances between validation and training images, but not distances between
validation images and their reconstructions.
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
from ldm.files.atomic import atomic_write, write_text
from ldm.files.digest import sha256_of_values
from ldm.files.untrusted import check_fields, first_line, read_json
from ldm.metrics.features import weights_digest
from ldm.metrics.subsets import NUM_GROUPS, jackknife_error
from ldm.progress import track
from ldm.runtime.random import derive_seed, torch_generator

FORMAT = 1
"""Version of the architecture, training recipe and file format. A new version causes the classifier to be retrained."""
NUM_STEPS, BATCH_SIZE, PEAK_LR, WEIGHT_DECAY = 1000, 256, 1e-2, 0.05
MAX_SIZE_PX = 64


class Classifier(nn.Module):
    """A convolutional classifier with features from its penultimate layer: [b, 3, H, W] in [-1, 1] -> [b, 64].

    Images larger than 64 px are resized to 64 px (bilinear, antialiased). H and W must be even.
    """

    name = "classifier"
    library = "ldm"
    dim = 64

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.key = self.name
        """Cache key of the features. It identifies the data set, split, seed, weights and image size."""
        self.val_accuracy: float | None = None
        """Accuracy on the validation images."""
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
        if images.shape[-1] > MAX_SIZE_PX:
            images = F.interpolate(images, size=MAX_SIZE_PX, mode="bilinear", antialias=True)
        return self.layers(images).mean(dim=(2, 3))

    def logits(self, images: Tensor) -> Tensor:
        """Return the class logits, [b, num_classes]."""
        return self.head(self(images))


def _convolution(in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


def load_classifier(images: ImageData, *, seed: int = 0, num_steps: int = NUM_STEPS) -> Classifier:
    """Load the frozen classifier of a data set from the data set's cache folder, or train the classifier and cache it.

    The files are features-classifier-<digest>.safetensors and a .json file with the training settings and the accuracy.

    Raises:
        UserError: If an image has no class label, or all training images belong to the same class.
    """
    labels = _labels(images)
    data = {"data_fingerprint": images.fingerprint, "val_fraction": images.val_fraction}
    settings: dict[str, Any] = {"format": FORMAT, **data, "seed": seed, "num_steps": num_steps}
    settings["num_classes"] = int(labels.max()) + 1
    digest = sha256_of_values(settings)[:8]
    classifier, name = Classifier(settings["num_classes"]), f"{Classifier.name}-{digest}"
    weights_file, facts_file = (images.path / f"features-{name}{suffix}" for suffix in (".safetensors", ".json"))
    if weights_file.is_file():
        try:
            classifier.load_state_dict(load_file(weights_file))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(
                f"{weights_file} cannot be read ({first_line(error)}). Delete the file to train the classifier again."
            ) from error
        content = read_json(facts_file)
        check_fields(content, {"val_accuracy": float}, facts_file)
        classifier.val_accuracy = content["val_accuracy"]
    else:
        fit_classifier(classifier, images, labels, seed=seed, num_steps=num_steps)
        classifier.val_accuracy = accuracy(classifier, images, labels, images.val_indices)
        content = {**settings, "val_accuracy": classifier.val_accuracy, "num_val": len(images.val_indices)}
        write_text(facts_file, json.dumps(content, indent=2) + "\n")
        with atomic_write(weights_file) as partial:  # last, so that the weights never exist without them
            save_file(classifier.state_dict(), partial)
    classifier.key = f"{name}-{weights_digest(classifier)}-{min(images.resolution, MAX_SIZE_PX)}px"
    return classifier.eval().requires_grad_(False)


def _labels(images: ImageData) -> Tensor:
    missing = len(images) if images.labels is None else images.labels.count(None)
    labels = torch.tensor([] if missing else images.labels)
    if missing or len(labels[images.train_indices].unique()) < 2:
        reason = f"{missing} of {len(images)} images have no label" if missing else "all training images have one class"
        raise UserError(
            f"features=classifier needs at least 2 classes and a class label for every image, but in {images.name}, "
            f"{reason}. Use features=efficientnet_lite, which needs no labels."
        )
    return labels


def fit_classifier(classifier: Classifier, images: ImageData, labels: Tensor, *, seed: int, num_steps: int) -> None:
    """Train a classifier on the training split with cross-entropy, AdamW, a linear warm-up and cosine decay to zero.

    Training runs on the CPU, so that features are the same on every machine. The initial weights and the image order
    depend only on the seed.
    """
    generator = torch_generator(seed, 1)
    for layer in classifier.modules():
        if isinstance(layer, nn.Conv2d):  # He initialisation, arXiv:1502.01852
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
    nn.init.zeros_(classifier.head.weight)
    nn.init.zeros_(classifier.head.bias)
    indices, order_seed = images.train_indices, derive_seed(seed, 2)
    batch_size = min(BATCH_SIZE, len(indices))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    warm_up = max(1, num_steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * k / num_steps))
    )
    network: Any = classifier.train()
    network.to(memory_format=torch.channels_last)  # 1.4 times faster on a CPU
    for step in track(range(num_steps), "training the classifier"):
        batch = indices[batch_at(step, size=len(indices), batch_size=batch_size, seed=order_seed)]
        loss = F.cross_entropy(classifier.logits(images.batch(batch)), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval().to(memory_format=torch.contiguous_format)


@torch.no_grad()
def accuracy(classifier: Classifier, images: ImageData, labels: Tensor, indices: np.ndarray) -> float:
    """Return the classification accuracy on the images at `indices`."""
    starts = range(0, len(indices), BATCH_SIZE)
    predicted = [classifier.logits(images.batch(indices[i : i + BATCH_SIZE])).argmax(1) for i in starts]
    return (torch.cat(predicted) == labels[indices]).double().mean().item()


def class_accuracy(predicted: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the accuracy p of predicted classes [n] given labels [n], and its standard error sqrt(p (1 - p) / n)."""
    proportion = (predicted == labels).double().mean().item()
    return proportion, math.sqrt(proportion * (1 - proportion) / len(predicted))


@torch.no_grad()
def predict_classes(classifier: Classifier, features: Tensor) -> Tensor:
    """Return the classes that a classifier predicts from features that it has extracted, [n, d] -> [n]."""
    return classifier.head(features.to(classifier.head.weight.device)).argmax(1).cpu()


def class_shift(predicted: Tensor, reference: Tensor, *, num_groups: int = NUM_GROUPS) -> tuple[float, float]:
    """Return the total variation distance between two class distributions, and its standard error.

        TV = 1/2 sum_c |p_c - q_c|,   from 0 to 1

    The standard error is a jackknife estimate over groups of samples. Because of sampling noise, TV is positive even if
    both distributions are equal.

    Args:
        predicted, reference: Classes [n] and [m] of the samples and of a reference set. Use predictions of the same
            classifier for both, so that its errors affect both sets equally.
    """
    num_classes = int(torch.cat([predicted, reference]).max()) + 1
    shares = reference.bincount(minlength=num_classes).double() / len(reference)
    group = torch.arange(len(predicted)) % num_groups
    counts = torch.stack([predicted[group == i].bincount(minlength=num_classes) for i in range(num_groups)]).double()

    def distance(counts: Tensor) -> Tensor:
        return (counts / counts.sum(-1, keepdim=True) - shares).abs().sum(-1) / 2

    return distance(counts.sum(0)).item(), jackknife_error(distance(counts.sum(0) - counts))
