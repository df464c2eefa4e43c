"""Report on a data set: metrics, and figures for visual inspection."""

import hashlib
import itertools
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

from ldm.data.accounting import account_for
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
from ldm.rules import Count, Integer, Number, Seed, checked
from ldm.runtime.random import numpy_generator

NUM_NEIGHBOURS, MAX_COMPARED = 5, 2000
"""k for density and coverage, and the maximum number of images per split to compare in feature space."""
MAX_LISTED, MAX_SHEET_IMAGES, MAX_PAIRS = 1000, 100, 12
"""Maximum number of duplicates listed in data.json (all are counted), of images on the contact sheet, and of pairs in
near_duplicates.png."""
FIGURES = {"contact_sheet.png", "near_duplicates.png", "balance.png"}
"""File names of all figures. Empty figures are not written."""


@checked
def inspect_data(
    images: ImageData,
    *,
    features: str = "efficientnet_lite",
    max_bits: Annotated[Integer, Field(ge=0, lt=32)] = 4,  # unrelated images differ in 32 of 64 bits on average
    max_levels: Annotated[Number, Field(ge=0, le=255)] = 4,
    tokenizer: Any = None,
    max_tokens: Count = 16,
    seed: Seed = 0,
    device: torch.device | str = "cpu",
) -> Report:
    """Report the size, duplicates, balance and diversity of a prepared data set.

    Args:
        features: A name from `ldm.metrics.features.FEATURE_NETWORKS`, or "none".
        max_bits, max_levels: Maximum distances between near duplicates, as in `near_duplicate_pairs`.
        tokenizer: Tokenizer of a text encoder. If given, captions with more than `max_tokens` tokens are counted.

    Raises:
        UserError: As raised by `load_features`.
    """
    network = None if features == NO_FEATURES else load_features(features).to(device)
    started = time.perf_counter()
    attributes = ("name", "fingerprint", "licence", "resolution", "num_bytes", "val_fraction")
    content: dict[str, Any] = {
        **{key: getattr(images, key) for key in attributes},
        "cache": str(images.path),
        "num_images": len(images),
        "num_train": len(images.train_indices),
        "num_val": len(images.val_indices),
        "unreadable": images.quarantine(),
        "accounting": account_for(images, tokenizer, max_tokens),
    }
    duplicates, pairs = _find_duplicates(images, max_bits, max_levels)
    content |= duplicates
    if images.labels is not None:
        content["classes"] = class_balance(images.labels, images.class_names)
    if images.captions is not None:
        texts: list[str | None] = []
        for i in range(len(images)):
            texts += images.captions_of(i) or [None]
        content["captions"] = caption_statistics(texts)
    if network is not None:
        diversity = _measure_diversity(images, reference_features(network, features, images), seed)
        content["features"] = {"network": features, **diversity}
    content["seconds"] = round(time.perf_counter() - started, 1)
    figures = _plot_figures(images, content, pairs, seed)
    return Report("data.json", content, data_table(content), figures=figures)


def _find_duplicates(
    images: ImageData, max_bits: int, max_levels: float
) -> tuple[dict[str, Any], list[tuple[int, int, str]]]:
    """Return the duplicate counts, and the most similar pairs with descriptions of how they differ."""
    digests: list[bytes] = []
    hashes, colours, blank = [], [], []
    starts = range(0, len(images), 256)
    for start in track(starts, "reading pixels"):
        batch = range(start, min(start + 256, len(images)))
        digests += [hashlib.sha256(image.tobytes()).digest() for image in images.images[start : start + 256]]
        pixels = images.batch(batch)
        hashes.append(metrics.dhash(pixels))
        colours.append(metrics.thumbnails(pixels))
        blank.append((pixels.amax((2, 3)) - pixels.amin((2, 3))).amax(1) <= 4 * metrics.LEVEL)
    index = metrics.DuplicateIndex(digests, images.train_indices, images.val_indices)
    rows = torch.from_numpy(index.distinct_indices)
    limits: dict[str, Any] = {"max_bits": max_bits, "max_levels": max_levels}
    for chunk in metrics.near_duplicate_pairs(torch.cat(hashes)[rows], torch.cat(colours)[rows], **limits):
        index.add(*chunk, max_stored=MAX_LISTED)

    def describe(i: int) -> dict[str, Any]:
        caption = {"caption": images.captions[i]} if images.captions else {}
        return {"index": i, "name": images.names[i], "split": "val" if index.is_val[i] else "train", **caption}

    originals, is_val, groups, pairs = index.first_copy, index.is_val, index.copy_groups(), index.closest_pairs()
    val_in_train = is_val & (index.representative[0, originals] >= 0)
    train_copies = ~is_val & (index.representative[0, originals] != np.arange(len(originals)))
    has_near_duplicate = index.has_near_duplicate[0, originals]
    content = {
        "blank": [describe(i) for i in torch.cat(blank).nonzero().flatten().tolist()],
        "copies": {
            "num_groups": len(groups),
            "num_train": int(train_copies.sum()),
            "num_val_in_train": int(val_in_train.sum()),
            "groups": [[describe(i) for i in group] for group in groups[:MAX_LISTED]],
        },
        "near_duplicates": {
            **limits,
            "num_pairs": index.num_pairs,
            "num_train": int((has_near_duplicate & ~is_val).sum()),
            "num_val_in_train": int((has_near_duplicate & is_val & ~val_in_train).sum()),
            "pairs": [{"bits": b, "levels": round(d, 2), "images": [describe(i), describe(j)]} for i, j, b, d in pairs],
        },
    }
    closest = [(i, j, f"differ in {bits} of 64 bits and by {levels:.1f} levels") for i, j, bits, levels in pairs]
    return content, closest + [(group[0], group[-1], "identical pixels") for group in groups]


def _measure_diversity(images: ImageData, features: Tensor, seed: int) -> dict[str, Any]:
    """Measure the diversity of the training images and their coverage of the validation images, in feature space."""
    generator = numpy_generator(seed, 1)
    train, val = (torch.from_numpy(generator.permutation(rows)) for rows in (images.train_indices, images.val_indices))
    n, gallery = min(len(train), len(val), MAX_COMPARED), features[train]
    content: dict[str, Any] = {"vendi_score": vendi_score(gallery), "k": NUM_NEIGHBOURS, "num_compared": n}
    if n > NUM_NEIGHBOURS:
        # for sets of equal size, both metrics are expected to be close to 1
        subsets = [subset for subset in train[: 4 * n].split(n) if len(subset) == n]
        values = [density_coverage(features[val[:n]], features[subset], k=NUM_NEIGHBOURS) for subset in subsets]
        content |= {"num_subsets": len(subsets), "expected_coverage": expected_coverage(n, n, k=NUM_NEIGHBOURS)}
        content |= zip(("density", "coverage"), np.mean(values, axis=0).tolist(), strict=True)
    if len(train) > 1:
        rows = torch.arange(len(train))[:MAX_COMPARED]
        content["nearest_distance_val"] = nearest_distances(features[val[:MAX_COMPARED]], gallery).mean().item()
        content["nearest_distance_train"] = nearest_distances(gallery[rows], gallery, self_rows=rows).mean().item()
    return content


def _plot_figures(
    images: ImageData,
    content: dict[str, Any],
    pairs: list[tuple[int, int, str]],
    seed: int,
) -> dict[str, Image.Image | Figure]:
    val = set(images.val_indices.tolist())
    rows = numpy_generator(seed, 2).permutation(len(images))[:MAX_SHEET_IMAGES].tolist()
    title = f"{images.name}: {len(rows)} of {len(images):,} images, chosen at random with seed {seed}"
    sheet = grid(to_pil(images.batch(rows)), [image_text(images, i) or images.names[i] for i in rows], title=title)
    figures: dict[str, Image.Image | Figure] = {"contact_sheet.png": sheet}
    if pairs:
        cells, texts = [], []
        for first, second, difference in pairs[:MAX_PAIRS]:
            cells += to_pil(images.batch([first, second]))
            texts += [
                f"{'val' if i in val else 'train'}: {image_text(images, i) or images.names[i]}" for i in (first, second)
            ]
            texts[-1] += f"; {difference}"
        figures["near_duplicates.png"] = grid(
            cells, texts, columns=6, title="Pairs of duplicates side by side, near duplicates first"
        )
    if content.keys() & {"classes", "captions"}:
        figures["balance.png"] = _plot_balance(content)
    return figures


def _plot_balance(content: dict[str, Any]) -> Figure:
    """Plot bar charts of the classes and of the words and lengths of captions, if the data has them."""
    bars: dict[str, dict[Any, int]] = {}
    if "classes" in content:
        classes = list(content["classes"]["counts"].items())
        bars["images per class"] = dict(classes if len(classes) <= 24 else classes[:12] + classes[-12:])
    if "captions" in content:
        bars["most frequent words in captions"] = content["captions"]["most_frequent_words"]
        bars["captions by number of words"] = content["captions"]["lengths"]
    figure = Figure(figsize=(5.2 * len(bars), 5), dpi=110, layout="constrained")
    for axes, (title, counts) in zip(figure.subplots(1, len(bars), squeeze=False)[0], bars.items(), strict=True):
        axes.bar_label(axes.barh(range(len(counts)), list(counts.values())), padding=2, fontsize=8)
        axes.set_yticks(range(len(counts)), [str(name)[:24] for name in counts], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(title)
    return figure


def class_balance(labels: Sequence[int | None], class_names: Sequence[str] | None) -> dict[str, Any]:
    """Return the number of images per class in descending order, the entropy and the effective number of classes.

    The entropy is that of the class distribution, in bits. The effective number of classes, 2^entropy, is the number of
    equally frequent classes with the same entropy.
    """
    by_label = Counter(label for label in labels if label is not None)
    names = class_names or {label: str(label) for label in by_label}
    counts = {names[label]: by_label[label] for label in (range(len(names)) if class_names else sorted(by_label))}
    shares = np.array([count for count in counts.values() if count]) / by_label.total()
    entropy_bits = float(-(shares * np.log2(shares)).sum()) + 0.0  # 0 instead of -0 for a single class
    return {
        "num_classes": len(counts),
        "entropy_bits": entropy_bits,
        "effective_classes": 2**entropy_bits,
        "num_missing": sum(label is None for label in labels),
        "counts": dict(sorted(counts.items(), key=lambda item: -item[1])),
    }


def caption_statistics(captions: Sequence[str | None], num_most_frequent: int = 20) -> dict[str, Any]:
    """Return caption counts, caption lengths in words, and the most frequent captions and words.

    Args:
        captions: All captions of all images; None for each image without a caption.
        num_most_frequent: Number of the most frequent captions and words to return.
    """
    texts = [caption for caption in captions if caption is not None and caption.strip()]
    words = [re.findall(r"\w+(?:['’]\w+)*", caption.lower()) for caption in texts]
    lengths = [len(caption) for caption in words] or [0]
    return {
        "num_captions": len(texts),
        "num_missing": sum(caption is None or not caption.strip() for caption in captions),
        "num_distinct": len(set(texts)),
        "fewest_words": min(lengths),
        "median_words": statistics.median(lengths),
        "most_words": max(lengths),
        "lengths": dict(sorted(Counter(map(len, words)).items())),
        "most_frequent": dict(Counter(texts).most_common(num_most_frequent)),
        "most_frequent_words": dict(Counter(itertools.chain(*words)).most_common(num_most_frequent)),
    }
