"""Tests that faults planted in held-out images are detected, and that stronger faults change the metrics more.

Held-out images are used as samples and compared with training images. The data is Fashion-MNIST if Debian's package is
installed, and synthetic gratings of ten kinds otherwise. The features come from a classifier of the data set
(`ldm.evaluation.classifier`), trained for 100 steps at the native resolution. EfficientNet would be slow, and upscaling
to 224 px would hide a blur of 0.5 px.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.data.images import prepare
from ldm.data.sources.base import Record
from ldm.data.sources.fashion_mnist import DEBIAN_PATH, FashionMNIST
from ldm.evaluation.classifier import Classifier, class_shift, load_classifier, predict_classes
from ldm.evaluation.features import extract
from ldm.evaluation.samples.distances import Measures
from ldm.evaluation.samples.memorisation import nearest_training

VAL_FRACTION = 0.25
QUICK, ALL = (12_000, 100, 2000), (70_000, 1000, 15_000)
"""Numbers of images, classifier training steps and samples."""

JACKKNIFE_METRICS = ("fd", "class_shift", "close_share")

Metrics = dict[str, tuple[float, float]]
"""Values and their standard errors, by name."""


class Clothes(FashionMNIST):
    """The first `num_images` images of Fashion-MNIST."""

    blurs = (0.5, 0.7, 1.0, 1.4)

    def __init__(self, num_images: int) -> None:
        super().__init__()
        self.num_images = num_images

    @property
    def num_records(self) -> int:
        return self.num_images

    def records(self) -> Iterator[Record]:
        return itertools.islice(super().records(), self.num_images)


class Gratings(Clothes):
    """Coarse and fine gratings in five directions with random phase, contrast and width."""

    blurs = (1.0, 1.2, 1.4, 1.8)

    def __init__(self, num_images: int) -> None:
        self.num_images, self.name = num_images, "gratings"
        self.class_names = [str(label) for label in range(10)]

    def identity(self) -> dict[str, int]:
        return {"gratings": self.num_images}

    def records(self) -> Iterator[Record]:
        generator = np.random.default_rng(0)
        y, x = (np.mgrid[:28, :28] - 13.5) / 14
        for number in range(self.num_images):
            label, phase, width = int(generator.integers(10)), generator.uniform(0, 6.28), generator.uniform(0.3, 0.9)
            angle, frequency = (label // 2 + generator.normal(0, 0.15)) * np.pi / 5, (10, 20)[label % 2]
            wave = np.cos((x * np.cos(angle) + y * np.sin(angle)) * frequency * generator.uniform(0.7, 1.3) + phase)
            envelope = generator.uniform(10, 60) * np.exp(-(x**2 + y**2) / (2 * width**2))
            pixels = np.uint8(127 + envelope * wave)
            yield Record(f"{number}", Image.fromarray(pixels).copy, None, label, pixels.tobytes())


@dataclass(frozen=True)
class Setting:
    """A classifier, the image sets to compare, and their features."""

    blurs: tuple[float, ...]
    classifier: Classifier
    samples: Tensor
    labels: Tensor
    train: Tensor
    train_features: Tensor
    validation_features: Tensor

    def measure(self, images: Tensor) -> Metrics:
        features = extract(self.classifier, images, "features")
        metrics = Measures(self.train_features, None).all(features)
        predicted, reference = (predict_classes(self.classifier, x) for x in (features, self.train_features))
        memorisation = nearest_training(features, self.train_features, self.validation_features)
        close = memorisation.close_share, memorisation.close_share_standard_error
        results = {name: (metric.value, metric.standard_error) for name, metric in metrics.items()}
        return {**results, "class_shift": class_shift(predicted, reference), "close_share": close}


def set_up(folder: Path, num_images: int, num_steps: int, num_samples: int) -> Setting:
    """Prepare the data and train the classifier.

    Held-out images that are not used as samples define the memorisation threshold.
    """
    source = (Clothes if Path(DEBIAN_PATH).is_dir() else Gratings)(num_images)
    images = prepare(source, resolution=28, cache_dir=folder, val_fraction=VAL_FRACTION, progress=False)
    classifier = load_classifier(images, num_steps=num_steps)
    held_out = np.random.default_rng(0).permutation(images.val_indices)
    train = images.batch(images.train_indices)
    return Setting(
        source.blurs,
        classifier,
        images.batch(held_out[:num_samples]),
        torch.tensor(images.labels)[held_out[:num_samples]],
        train,
        extract(classifier, train, "features"),
        extract(classifier, images.batch(held_out[num_samples:]), "features"),
    )


def drop_classes(setting: Setting, dose: float) -> Tensor:
    """Remove `dose` classes. A fractional dose removes only part of the last class."""
    keep = torch.ones(len(setting.samples), dtype=torch.bool)
    for label, share in ((3, min(dose, 1.0)), (5, max(dose - 1, 0.0))):
        rows = (setting.labels == label).nonzero()[:, 0]
        keep[rows[: round(share * len(rows))]] = False
    return setting.samples[keep]


def blur(setting: Setting, dose: float) -> Tensor:
    """Blur with a Gaussian whose standard deviation is `dose` pixels."""
    radius = 5
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / dose) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(setting.samples, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def copy_training_images(setting: Setting, dose: float) -> Tensor:
    """Replace the fraction `dose` of the samples with training images."""
    num = round(dose * len(setting.samples))
    rows = torch.randperm(len(setting.train), generator=torch.Generator().manual_seed(1))[:num]
    return torch.cat([setting.train[rows], setting.samples[num:]])


def add_noise(setting: Setting, dose: float) -> Tensor:
    """Add noise with standard deviation `dose`, for intensities in [0, 1]."""
    noise = torch.randn(setting.samples.shape, generator=torch.Generator().manual_seed(2))
    return (setting.samples + 2 * dose * noise).clamp(-1, 1)


@pytest.fixture(scope="module", params=[QUICK, pytest.param(ALL, marks=pytest.mark.slow)], ids=["quick", "all"])
def setting(request, tmp_path_factory) -> Setting:
    return set_up(tmp_path_factory.mktemp("images"), *request.param)


@pytest.fixture(scope="module")
def clean(setting) -> Metrics:
    return setting.measure(setting.samples)


def measure_all(setting: Setting, fault: Callable[[Setting, float], Tensor], doses: tuple[float, ...]) -> list[Metrics]:
    return [setting.measure(fault(setting, dose)) for dose in doses]


def half_width(name: str, error: float) -> float:
    """Return the half width of the 95% interval, from Student's t for 20 jackknife groups or 4 subsets."""
    return (2.09 if name in JACKKNIFE_METRICS else 3.18) * error


def assert_grows(name: str, clean: Metrics, results: list[Metrics], detection_index: int = 0) -> None:
    """Assert that a metric grows with the dose, and exceeds the clean interval at `results[detection_index]`."""
    values = [metrics[name][0] for metrics in (clean, *results)]
    assert all(np.diff(values) > 0), (name, values)
    assert values[1 + detection_index] > values[0] + half_width(name, clean[name][1]), (name, values, clean[name])


def assert_falls(name: str, clean: Metrics, results: list[Metrics]) -> None:
    values = [metrics[name][0] for metrics in (clean, *results)]
    assert all(np.diff(values) < 0), (name, values)


def assert_unchanged(name: str, clean: Metrics, results: list[Metrics]) -> None:
    """Assert that the difference from the clean samples is within the 95% interval at every dose."""
    value, error = clean[name]
    for metrics in results:
        faulty, faulty_error = metrics[name]
        assert abs(faulty - value) <= half_width(name, (error**2 + faulty_error**2) ** 0.5), (name, faulty, value)


def assert_does_not_rise(name: str, clean: Metrics, results: list[Metrics]) -> None:
    value, error = clean[name]
    assert max(metrics[name][0] for metrics in results) <= value + half_width(name, error)


def test_dropped_classes_are_detected(setting, clean):
    """FD, class shift, coverage and recall change; density and memorisation do not."""
    results = measure_all(setting, drop_classes, (0.5, 1.0, 1.5, 2.0))
    assert_grows("fd", clean, results)
    assert_grows("class_shift", clean, results, detection_index=1)
    for name, i in (("coverage", 1), ("recall", 3)):
        value, error = clean[name]
        assert results[i][name][0] < value - half_width(name, error) and results[3][name][0] <= results[i][name][0]
    for name in ("density", "close_share"):
        assert_unchanged(name, clean, results)


def test_blur_is_detected(setting, clean):
    results = measure_all(setting, blur, setting.blurs)
    assert_grows("fd", clean, results)
    assert_grows("kd", clean, results, detection_index=2)
    assert_falls("coverage", clean, results)
    assert_does_not_rise("close_share", clean, results)


def test_copies_of_training_images_are_detected(setting, clean):
    """Only memorisation detects copies; the remaining metrics rate them as perfect samples."""
    results = measure_all(setting, copy_training_images, (0.02, 0.04, 0.08, 0.16))
    assert_grows("close_share", clean, results)
    for metrics, dose in zip(results, (0.02, 0.04, 0.08, 0.16), strict=True):
        assert metrics["close_share"][0] == pytest.approx(dose + clean["close_share"][0] * (1 - dose), abs=0.005)
    for name in ("fd", "kd", "precision", "recall", "density", "coverage", "class_shift"):
        assert_unchanged(name, clean, results)


def test_noise_is_detected(setting, clean):
    results = measure_all(setting, add_noise, (0.02, 0.05, 0.1, 0.2))
    assert_grows("fd", clean, results)
    assert_grows("kd", clean, results, detection_index=1)
    assert_falls("coverage", clean, results)
    assert_does_not_rise("close_share", clean, results)
