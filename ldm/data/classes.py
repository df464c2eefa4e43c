"""Class numbers: which integer label stands for which class name."""

import re
from collections.abc import Iterator, Sequence

NO_CLASSES = "no classes"
"""Start of the note on why the folders of a data set are not classes."""
Labels = list[int | None]


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that orders numbers in names by value: -1 before 2, and class2 before class10."""
    if re.fullmatch(r"-?[0-9]{1,18}", name):
        return ((0, int(name), name),)
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    numbers = [part.lstrip("0") or "0" if part[0] in "0123456789" else None for part in parts]
    keys = [
        (2, 0, part) if number is None else (1, len(number), number)
        for part, number in zip(parts, numbers, strict=True)
    ]
    return (*keys, (-1, 0, name))


def number_classes(
    classes: Sequence[int | str | None], declared: Sequence[str] | None
) -> tuple[Labels | None, list[str] | None]:
    """Return the label of each image, and the class names in the order of their labels.

    Args:
        classes: The class of each image: its name, or an index into `declared`.
        declared: All class names of the source. If None, they are collected from `classes`, in natural order.
    """
    occurring = {str(value) for value in classes if value is not None}
    class_names = list(declared) if declared else sorted(occurring, key=natural_key)
    if not occurring:
        return None, class_names or None
    label_of = {name: label for label, name in reversed([*enumerate(class_names)])}
    return [
        value if value is None or (declared and isinstance(value, int)) else label_of[str(value)] for value in classes
    ], class_names


def older_numberings(
    labels: Labels | None, class_names: Sequence[str] | None, names: Sequence[str]
) -> Iterator[tuple[Labels | None, list[str] | None]]:
    """Yield the labels and class names that earlier versions may have given to the same images.

    Earlier versions sorted folders as text, took `train` for the class of train/cat/1.png or found no class, numbered
    texts in the order of their first image, and used integers as labels unchanged.

    Args:
        names: Names of the images; for images from a folder, their relative paths.
    """
    yield None, None
    if labels is None or class_names is None:
        return
    classes = [None if label is None else class_names[label] for label in labels]
    folders = [name.split("/")[0] for name in names]
    first_images = [*dict.fromkeys(name for name in classes if name is not None)]
    for groups, order in ((folders, sorted({*folders})), (classes, sorted(class_names)), (classes, first_images)):
        label_of = {name: label for label, name in enumerate(order)}
        yield [None if name is None else label_of[name] for name in groups], order
    if all(re.fullmatch(r"[0-9]{1,6}", name) for name in class_names):
        unchanged = [None if name is None else int(name) for name in classes]
        yield unchanged, [str(label) for label in range(1 + max(map(int, class_names)))]
