"""ldm.data.classes: class numbers follow class names."""

import numpy as np
import pytest

from ldm.data.classes import natural_key, number_classes
from ldm.data.images import ImageData
from tests.data.encoded import png, prepare_quietly
from tests.data.test_images import MemorySource


def test_natural_order_sorts_numbers_in_names_by_value():
    names = ["class10", "class2", "10", "-1", "2", "-10", "a", "0", "1" * 30, "class", "class2b", "٣", ""]
    expected = ["", "-10", "-1", "0", "2", "10", "1" * 30, "a", "class", "class2", "class2b", "class10", "٣"]
    assert sorted(names, key=natural_key) == expected


@pytest.mark.parametrize(
    ("classes", "labels", "names"),
    [
        ([3, 7, 1000, 3], [0, 1, 2, 0], ["3", "7", "1000"]),
        ([1, 2, 3], [0, 1, 2], ["1", "2", "3"]),
        ([-2, 1, None, 2], [0, 1, None, 2], ["-2", "1", "2"]),
        (["2", "10", "1", "0"], [2, 3, 1, 0], ["0", "1", "2", "10"]),
        (["dog", "cat", "dog"], [1, 0, 1], ["cat", "dog"]),
        ([None, None], None, None),
    ],
)
def test_classes_that_occur_are_numbered_in_natural_order(classes, labels, names):
    assert number_classes(classes, None) == (labels, names)


def test_declared_classes_keep_their_numbers_even_if_they_do_not_occur():
    assert number_classes([2, None, 0], ["b", "a", "c"]) == ([2, None, 0], ["b", "a", "c"])
    assert number_classes(["c", "b"], ["b", "a", "c"]) == ([2, 0], ["b", "a", "c"])
    assert number_classes([None], ["b", "a"]) == (None, ["b", "a"])


class ClassSource(MemorySource):
    """Images of the given classes, under the given names."""

    class_names = None

    def __init__(self, classes, names):
        super().__init__({name: png(number) for number, name in enumerate(names)})
        self.classes = classes

    def records(self):
        for record, value in zip(super().records(), self.classes, strict=True):
            yield type(record)(record.name, record.load, record.caption, value)


@pytest.mark.parametrize(
    ("classes", "older_labels", "older_names"),
    [
        (["0", "2", "10", "2"], [0, 2, 1, 2], ["0", "10", "2"]),  # folders sorted as text
        ([3, 7, 3, 5], [3, 7, 3, 5], [str(label) for label in range(8)]),  # integers used as labels
        (["dog", "cat", "dog", "ant"], [0, 1, 0, 2], ["dog", "cat", "ant"]),  # order of first appearance
        (["cat", "dog", "cat", "dog"], [0, 0, 1, 1], ["train", "val"]),  # the folders train/ and val/
    ],
)
def test_resumed_runs_keep_the_class_numbers_of_earlier_versions(tmp_path, classes, older_labels, older_names):
    names = [
        f"{split}/{value}/{i}.png"
        for i, (split, value) in enumerate(zip(["train"] * 2 + ["val"] * 2, classes, strict=True))
    ]
    if older_names != ["train", "val"]:
        names = [name.split("/", 1)[1] for name in names]
    images = prepare_quietly(ClassSource(classes, names), tmp_path)
    older = ClassSource(older_labels, names)
    older.class_names = older_names
    fingerprint = prepare_quietly(older, tmp_path / "older").fingerprint
    assert fingerprint != images.fingerprint
    restored = ImageData.open(images.path, images.val_fraction, fingerprint)
    assert (restored.fingerprint, restored.labels, restored.class_names) == (fingerprint, older_labels, older_names)
    unchanged = ImageData.open(images.path, images.val_fraction, "0" * 64)
    assert unchanged.fingerprint == images.fingerprint and unchanged.labels == images.labels
    np.testing.assert_array_equal(restored.images, images.images)
