"""What is in a data set: its metrics, and pictures for people to look at."""

import hashlib
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from pydantic import Field
from torch import Tensor

from ldm.data.images import ImageData
from ldm.evaluation.data.summary import data_table
from ldm.evaluation.features import NO_FEATURES, load_features, reference_features
from ldm.evaluation.image_sets import image_text
from ldm.image_grid import grid, to_pil
from ldm.metrics import duplicates as metrics
from ldm.metrics.kernel import vendi_score
from ldm.metrics.neighbours import density_coverage, expected_coverage, nearest_distances
from ldm.metrics.report import Report
from ldm.progress import track
from ldm.rules import Number, Seed, Whole, checked
from ldm.runtime.random import numpy_generator

NEIGHBOURS, COMPARED = 5, 2000
"""k of density and coverage; most images of each split whose places in the feature space are compared."""
LISTED, SHEET, PAIRS = 1000, 100, 12
"""Most copies in data.json (all are counted), images on the contact sheet, pairs in near_duplicates.png."""
PICTURES = {"contact_sheet.png", "near_duplicates.png", "balance.png"}
"""Where there is something to show."""


@checked
def inspect_data(
    images: ImageData,
    *,
    features: str = "efficientnet_lite",
    max_bits: Annotated[Whole, Field(ge=0, lt=32)] = 4,  # unlike images differ in 32 of the 64 bits
    max_levels: Annotated[Number, Field(ge=0, le=255)] = 4,
    seed: Seed = 0,
    device: torch.device | str = "cpu",
) -> Report:
    """Count, compare and draw a prepared data set.

    Args:
        features: A name of `ldm.metrics.features.CHOICES`, or none.
        max_bits, max_levels: How far near duplicates may be apart, as in `near_pairs`.

    Raises:
        UserError: unknown features, or their packages are not installed.
    """
    network = None if features == NO_FEATURES else load_features(features).to(device)
    started = time.perf_counter()
    kept = ("name", "fingerprint", "licence", "resolution", "num_bytes", "val_fraction")
    content: dict[str, Any] = {
        **{key: getattr(images, key) for key in kept},
        "cache": str(images.path),
        "num_images": len(images),
        "num_train": len(images.train_indices),
        "num_val": len(images.val_indices),
        "unreadable": images.quarantine(),
        "colour_profiles": images.describe_profiles() or "none",
    }
    copies, alike = _find_copies(images, max_bits, max_levels)
    content |= copies
    if images.labels is not None:
        content["classes"] = class_balance(images.labels, images.class_names)
    if images.captions is not None:
        texts: list[str | None] = []
        for i in range(len(images)):
            texts += images.captions_of(i) or [None]
        content["captions"] = caption_statistics(texts)
    if network is not None:
        found = _measure_in_features(images, reference_features(network, features, images), seed)
        content["features"] = {"network": features, **found}
    content["seconds"] = round(time.perf_counter() - started, 1)
    pictures = _draw_pictures(images, content, alike, seed)
    return Report("data.json", content, data_table(content), pictures=pictures)


def _find_copies(
    images: ImageData, max_bits: int, max_levels: float
) -> tuple[dict[str, Any], list[tuple[int, int, str]]]:
    """Figures, and the most alike pairs with how they differ."""
    digests: list[bytes] = []
    hashes, colours, blank = [], [], []
    starts = range(0, len(images), 256)
    for start in track(starts, "reading pixels"):
        part = range(start, min(start + 256, len(images)))
        digests += [hashlib.sha256(image.tobytes()).digest() for image in images.images[start : start + 256]]
        pixels = images.batch(part)
        hashes.append(metrics.dhash(pixels))
        colours.append(metrics.thumbnails(pixels))
        blank.append((pixels.amax((2, 3)) - pixels.amin((2, 3))).amax(1) <= 4 * metrics.LEVEL)
    copies = metrics.Copies(digests, images.train_indices, images.val_indices)
    rows = torch.from_numpy(copies.distinct)
    limits: dict[str, Any] = {"max_bits": max_bits, "max_levels": max_levels}
    for found in metrics.near_pairs(torch.cat(hashes)[rows], torch.cat(colours)[rows], **limits):
        copies.add(*found, keep=LISTED)

    def named(i: int) -> dict[str, Any]:
        caption = {"caption": images.captions[i]} if images.captions else {}
        return {"index": i, "name": images.names[i], "split": "val" if copies.is_val[i] else "train", **caption}

    first, is_val, groups, pairs = copies.first, copies.is_val, copies.groups(), copies.near()
    shared = is_val & (copies.member[0, first] >= 0)
    repeated = ~is_val & (copies.member[0, first] != np.arange(len(first)))
    is_near = copies.is_near[0, first]
    content = {
        "blank": [named(i) for i in torch.cat(blank).nonzero().flatten().tolist()],
        "copies": {
            "num_groups": len(groups),
            "num_train": int(repeated.sum()),
            "num_val_in_train": int(shared.sum()),
            "groups": [[named(i) for i in group] for group in groups[:LISTED]],
        },
        "near_duplicates": {
            **limits,
            "num_pairs": copies.num_pairs,
            "num_train": int((is_near & ~is_val).sum()),
            "num_val_in_train": int((is_near & is_val & ~shared).sum()),
            "pairs": [{"bits": b, "levels": round(d, 2), "images": [named(i), named(j)]} for i, j, b, d in pairs],
        },
    }
    alike = [(i, j, f"{bits} of 64 bits, {levels:.1f} levels apart") for i, j, bits, levels in pairs]
    return content, alike + [(group[0], group[-1], "the same pixels") for group in groups]


def _measure_in_features(images: ImageData, features: Tensor, seed: int) -> dict[str, Any]:
    """How well the training images cover the validation images, and how diverse they are."""
    generator = numpy_generator(seed, 1)
    train, val = (torch.from_numpy(generator.permutation(part)) for part in (images.train_indices, images.val_indices))
    n, gallery = min(len(train), len(val), COMPARED), features[train]
    content: dict[str, Any] = {"vendi_score": vendi_score(gallery), "k": NEIGHBOURS, "num_compared": n}
    if n > NEIGHBOURS:
        # as many of each, for then both metrics have an expectation near 1
        parts = [part for part in train[: 4 * n].split(n) if len(part) == n]
        found = [density_coverage(features[val[:n]], features[part], k=NEIGHBOURS) for part in parts]
        content |= {"num_subsets": len(parts), "expected_coverage": expected_coverage(n, n, k=NEIGHBOURS)}
        content |= zip(("density", "coverage"), np.mean(found, axis=0).tolist(), strict=True)
    if len(train) > 1:
        own = torch.arange(len(train))[:COMPARED]
        content["nearest_distance_val"] = nearest_distances(features[val[:COMPARED]], gallery).mean().item()
        content["nearest_distance_train"] = nearest_distances(gallery[:COMPARED], gallery, own=own).mean().item()
    return content


def _draw_pictures(
    images: ImageData,
    content: dict[str, Any],
    alike: list[tuple[int, int, str]],
    seed: int,
) -> dict[str, Image.Image | Figure]:
    val = set(images.val_indices.tolist())
    drawn = numpy_generator(seed, 2).permutation(len(images))[:SHEET].tolist()
    title = f"{images.name}: {len(drawn)} of {len(images):,} images, drawn with seed {seed}"
    sheet = grid(to_pil(images.batch(drawn)), [image_text(images, i) or images.names[i] for i in drawn], title=title)
    pictures: dict[str, Image.Image | Figure] = {"contact_sheet.png": sheet}
    if alike:
        shown, texts = [], []
        for first, second, how in alike[:PAIRS]:
            shown += to_pil(images.batch([first, second]))
            texts += [
                f"{'val' if i in val else 'train'}: {image_text(images, i) or images.names[i]}" for i in (first, second)
            ]
            texts[-1] += f"; {how}"
        pictures["near_duplicates.png"] = grid(
            shown, texts, columns=6, title="Pairs side by side, the most alike first"
        )
    if content.keys() & {"classes", "captions"}:
        pictures["balance.png"] = _plot_balance(content)
    return pictures


def _plot_balance(content: dict[str, Any]) -> Figure:
    """Classes, and words and lengths of captions: those that there are."""
    bars: dict[str, dict[Any, int]] = {}
    if "classes" in content:
        counts = list(content["classes"]["counts"].items())
        bars["images per class"] = dict(counts if len(counts) <= 24 else counts[:12] + counts[-12:])
    if "captions" in content:
        bars["most frequent words of the captions"] = content["captions"]["most_frequent_words"]
        bars["words of a caption"] = content["captions"]["lengths"]
    figure = Figure(figsize=(5.2 * len(bars), 5), dpi=110, layout="constrained")
    for axes, (title, counted) in zip(figure.subplots(1, len(bars), squeeze=False)[0], bars.items(), strict=True):
        axes.bar_label(axes.barh(range(len(counted)), list(counted.values())), padding=2, fontsize=8)
        axes.set_yticks(range(len(counted)), [str(name)[:24] for name in counted], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(title)
    return figure


def class_balance(labels: Sequence[int | None], class_names: Sequence[str] | None) -> dict[str, Any]:
    """Images per class, most first; their entropy, and how many equal classes would have it."""
    counted = Counter(label for label in labels if label is not None)
    names = class_names or {label: str(label) for label in counted}
    counts = {names[label]: counted[label] for label in (range(len(names)) if class_names else sorted(counted))}
    shares = np.array([count for count in counts.values() if count]) / counted.total()
    entropy_bits = float(-(shares * np.log2(shares)).sum()) + 0.0  # of one class 0, not -0
    return {
        "num_classes": len(counts),
        "entropy_bits": entropy_bits,
        "effective_classes": 2**entropy_bits,
        "num_missing": sum(label is None for label in labels),
        "counts": dict(sorted(counts.items(), key=lambda item: -item[1])),
    }


def caption_statistics(captions: Sequence[str | None], most: int = 20) -> dict[str, Any]:
    """How many captions there are, how many of them differ, how long they are, and what they say most often.

    Args:
        captions: Of all images, those of one image after each other; None for an image without any.
    """
    given = [caption for caption in captions if caption is not None and caption.strip()]
    words = [re.findall(r"\w+(?:['’]\w+)*", caption.lower()) for caption in given]
    lengths = [len(found) for found in words] or [0]
    return {
        "num_captions": len(given),
        "num_missing": sum(caption is None or not caption.strip() for caption in captions),
        "num_distinct": len(set(given)),
        "fewest_words": min(lengths),
        "median_words": statistics.median(lengths),
        "most_words": max(lengths),
        "lengths": dict(sorted(Counter(map(len, words)).items())),
        "most_frequent": dict(Counter(given).most_common(most)),
        "most_frequent_words": dict(Counter(word for found in words for word in found).most_common(most)),
    }
