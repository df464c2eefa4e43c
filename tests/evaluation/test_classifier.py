"""Tests of ldm.evaluation.classifier: training, caching and reproducibility."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.data.images import ImageData, prepare
from ldm.data.sources.image_folder import ImageFolder
from ldm.errors import UserError
from ldm.evaluation import classifier as classifier_module
from ldm.evaluation.classifier import Classifier, load_classifier
from ldm.evaluation.features import load_features, reference_features

STEPS = 25


def make_stripes(folder: Path, count: int, axis: int, seed: int) -> None:
    """Create 8 x 8 images with stripes along one axis, with random offsets and colours."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        pixels = np.zeros((8, 8, 3), np.uint8)
        line = (np.arange(8) + generator.integers(4)) % 4 < 2
        pixels[line if axis == 0 else (slice(None), line)] = generator.integers(100, 256, 3)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")


@pytest.fixture(scope="module")
def image_cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stripes")
    for axis, name in enumerate(("horizontal", "vertical")):
        make_stripes(folder / "stripes" / name, 60, axis, seed=axis)
    return prepare(ImageFolder(folder / "stripes"), resolution=8, cache_dir=folder / "cache", progress=False).path


@pytest.fixture
def images(image_cache, tmp_path) -> ImageData:
    return ImageData.open(shutil.copytree(image_cache, tmp_path / "cache"), val_fraction=0.3)


def test_classifier_learns_classes_and_returns_64_features(images):
    classifier = load_classifier(images, num_steps=STEPS)
    assert classifier.val_accuracy > 0.9
    labels = torch.tensor(images.labels)
    logits = classifier.head(classifier(images.batch(images.val_indices)))
    assert classifier.val_accuracy == (logits.argmax(1) == labels[images.val_indices]).double().mean().item()
    features = classifier(images.batch(range(5)))
    assert features.shape == (5, Classifier.dim) and not features.requires_grad and not classifier.training
    torch.testing.assert_close(features[:2], classifier(images.batch(range(2))))
    for size in (6, 65):
        assert classifier(torch.zeros(2, 3, size, size)).shape == (2, 64)


def test_classifier_is_cached_next_to_the_images(images, monkeypatch):
    classifier = load_classifier(images, num_steps=STEPS)
    (file,) = images.path.glob("features-*.safetensors")
    assert classifier.key.startswith(file.stem.removeprefix("features-")) and classifier.key.endswith("-8px")
    facts = json.loads(file.with_suffix(".json").read_text())
    assert facts["data_fingerprint"] == images.fingerprint and facts["val_accuracy"] == classifier.val_accuracy
    assert facts["num_val"] == len(images.val_indices) and not list(images.path.glob("*partial*"))
    with monkeypatch.context() as context:
        context.setattr(classifier_module, "fit_classifier", lambda *_, **__: pytest.fail("trained again"))
        cached_classifier = load_classifier(images, num_steps=STEPS)
    assert cached_classifier.val_accuracy == classifier.val_accuracy
    pixels = images.batch(range(4))
    assert torch.equal(cached_classifier(pixels), classifier(pixels))
    file.unlink()
    torch.manual_seed(17)  # the global seed must not matter
    assert torch.equal(load_classifier(images, num_steps=STEPS)(pixels), classifier(pixels))


def test_key_depends_on_split_seed_and_weights(images):
    """A shared key would mix up images of different splits, or features from different weights."""
    classifier = load_classifier(images, num_steps=1)
    (file,) = images.path.glob("features-*.safetensors")
    weights = load_file(file)
    save_file({**weights, "head.bias": weights["head.bias"] + 1}, file)
    keys = {classifier.key, load_classifier(images, num_steps=1).key, load_classifier(images, num_steps=1, seed=1).key}
    keys.add(load_classifier(ImageData.open(images.path, 0.4), num_steps=1).key)
    assert len(keys) == 4


def test_features_are_cached_under_the_classifier_key(images, monkeypatch):
    monkeypatch.setattr(classifier_module.load_classifier, "__kwdefaults__", {"seed": 0, "num_steps": STEPS})
    network = load_features("classifier", images)
    features = reference_features(network, "classifier", images)
    assert (images.path / f"features-{network.key}-{images.fingerprint[:8]}.npy").is_file()
    torch.testing.assert_close(features, network(images.batch(range(len(images)))))


def test_classifier_rejects_images_without_two_classes(make_images, images, tmp_path):
    unlabelled = make_images(tmp_path / "plain", 6, size=8)
    images_without_labels = prepare(ImageFolder(unlabelled), resolution=8, cache_dir=tmp_path / "other", progress=False)
    with pytest.raises(UserError, match=r"class label.*plain.*6 of 6 images.*features=efficientnet_lite"):
        load_features("classifier", images_without_labels)
    images.labels[:] = [0] * len(images)
    with pytest.raises(UserError, match="at least 2 classes"):
        load_classifier(images)
