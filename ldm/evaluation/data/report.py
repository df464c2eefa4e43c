"""What is in a data set: its metrics, and pictures for people to look at."""

import hashlib
import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ldm.data.images import ImageData
from ldm.evaluation.data.summary import advice
from ldm.evaluation.features import NO_FEATURES, load_features, reference_features
from ldm.evaluation.reconstructions.figure import image_text
from ldm.image_grid import MARGIN, PAPER, grid, to_pil
from ldm.metrics import duplicates as metrics
from ldm.metrics.kernel import vendi_score
from ldm.metrics.neighbours import density_coverage, expected_coverage, nearest_distances
from ldm.progress import track
from ldm.runtime.random import numpy_generator

NEIGHBOURS, COMPARED = 5, 2000
"""k of density and coverage; most images of each split whose places in the feature space are compared."""
LISTED, SHEET, PAIRS = 1000, 100, 12
"""Most copies in data.json (all are counted), images on the contact sheet, pairs in near_duplicates.png."""
PICTURES = ("contact_sheet", "near_duplicates", "balance")
BLUE, ORANGE = "#0072B2", "#E69F00"


@dataclass(frozen=True)
class DataReport:
    """Figures for data.json, and pictures by the name of their file."""

    content: dict[str, Any]
    pictures: dict[str, Image.Image | Figure]

    def save(self, folder: Path) -> list[Path]:
        """Write data.json and the pictures; an earlier report's picture that this one has not is removed."""
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / "data.json"]
        text = json.dumps(self.content, indent=2, ensure_ascii=False)
        files[0].write_text(text + "\n", encoding="utf-8")
        for name in PICTURES:
            file, picture = folder / f"{name}.png", self.pictures.get(name)
            if picture is None:
                file.unlink(missing_ok=True)
                continue
            picture.savefig(file, dpi=110) if isinstance(picture, Figure) else picture.save(file)
            files.append(file)
        return files


def inspect_data(
    images: ImageData,
    *,
    features: str = "efficientnet_lite",
    max_bits: int = 4,
    max_levels: float = 4,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> DataReport:
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
    distances: dict[str, Tensor] = {}
    if network is not None:
        content["features"], distances = _measure_in_features(
            images, reference_features(network, features, images), seed
        )
        content["features"] = {"network": features, **content["features"]}
    content["what_to_do"] = list(advice(content))
    content["seconds"] = round(time.perf_counter() - started, 1)
    return DataReport(content, _draw_pictures(images, content, alike, distances, seed))


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
    near = metrics.near_pairs(
        torch.cat(hashes)[rows], torch.cat(colours)[rows], max_bits=max_bits, max_levels=max_levels
    )
    for found in track(near, "near duplicates", metrics.num_block_pairs(len(rows))):
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
            "max_bits": max_bits,
            "max_levels": max_levels,
            "num_pairs": copies.num_pairs,
            "num_train": int((is_near & ~is_val).sum()),
            "num_val_in_train": int((is_near & is_val & ~shared).sum()),
            "pairs": [{"bits": b, "levels": round(d, 2), "images": [named(i), named(j)]} for i, j, b, d in pairs],
        },
    }
    alike = [(i, j, f"{bits} of 64 bits, {levels:.1f} levels apart") for i, j, bits, levels in pairs]
    return content, alike + [(group[0], group[-1], "the same pixels") for group in groups]


def _measure_in_features(images: ImageData, features: Tensor, seed: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Figures, and distances of validation and training images to the nearest other training image."""
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
    queries = {"val": (features[val[:COMPARED]], None), "train": (gallery[:COMPARED], torch.arange(len(train)))}
    distances = {}
    for split, (rows, own) in queries.items():
        if len(train) > 1:
            starts = range(0, len(rows), 256)
            nearest = [
                nearest_distances(rows[i : i + 256], gallery, own=None if own is None else own[i : i + 256])
                for i in track(starts, f"nearest training images, {split}")
            ]
            distances[split] = torch.cat(nearest)[:, 0]
            content[f"nearest_distance_{split}"] = distances[split].mean().item()
    return content, distances


def _draw_pictures(
    images: ImageData,
    content: dict[str, Any],
    alike: list[tuple[int, int, str]],
    distances: dict[str, Tensor],
    seed: int,
) -> dict[str, Image.Image | Figure]:
    drawn = numpy_generator(seed, 2).permutation(len(images))[:SHEET].tolist()
    title = f"{images.name}: {len(drawn)} of {len(images):,} images, drawn with seed {seed}"
    sheet = grid(to_pil(images.batch(drawn)), [image_text(images, i) or images.names[i] for i in drawn], title=title)
    pictures: dict[str, Image.Image | Figure] = {"contact_sheet": sheet}
    if alike:
        val = set(images.val_indices.tolist())
        tiles = []
        for *pair, how in alike[:PAIRS]:
            texts = [f"{'val' if i in val else 'train'}: {image_text(images, i) or images.names[i]}" for i in pair]
            tiles.append(grid(to_pil(images.batch(pair)), texts, columns=2, title=how))
        width, height, columns = tiles[0].width + 4 * MARGIN, tiles[0].height + 2 * MARGIN, min(3, len(tiles))
        board = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), PAPER)
        for i, tile in enumerate(tiles):
            board.paste(tile, (i % columns * width, i // columns * height))
        pictures["near_duplicates"] = board
    if distances or content.keys() & {"classes", "captions"}:
        pictures["balance"] = _plot_balance(content, distances)
    return pictures


def _plot_balance(content: dict[str, Any], distances: dict[str, Tensor]) -> Figure:
    """Classes, words and lengths of captions, and distances in the feature space: those that there are."""
    bars = {}
    if "classes" in content:
        counts = list(content["classes"]["counts"].items())
        bars["images per class"] = counts if len(counts) <= 24 else counts[:12] + [("...", 0)] + counts[-12:]
    if "captions" in content:
        bars["most frequent words of the captions"] = list(content["captions"]["most_frequent_words"].items())
    num_panels = len(bars) + ("captions" in content) + bool(distances)
    figure = Figure(figsize=(5.2 * num_panels, 5), layout="constrained")
    panels = iter(figure.subplots(1, num_panels, squeeze=False)[0])
    for title, counts in bars.items():
        axes = next(panels)
        drawn = axes.barh([str(place) for place in range(len(counts))], [count for _, count in counts], color=BLUE)
        axes.bar_label(drawn, [f"{count:,}" if count else "" for _, count in counts], padding=2, fontsize=8)
        axes.set_yticks(range(len(counts)), [name[:24] for name, _ in counts], fontsize=8)
        axes.set(title=title, ylim=(len(counts) - 0.4, -0.6))
    if "captions" in content:
        axes, lengths = next(panels), content["captions"]["lengths"]
        axes.bar(lengths.keys(), lengths.values(), width=1, color=BLUE, edgecolor="white")
        axes.set(title="length of the captions", xlabel="words", ylabel="captions")
    if distances:
        axes, edges = next(panels), np.histogram_bin_edges(torch.cat(list(distances.values())).numpy(), 24)
        for (split, values), colour in zip(distances.items(), (ORANGE, BLUE), strict=True):
            share = torch.full_like(values, 1 / len(values))
            axes.hist(
                values, edges, weights=share, histtype="stepfilled", alpha=0.5, color=colour, label=f"from {split}"
            )
        axes.set(title="distance to the nearest other training image", xlabel="in the feature space", ylabel="share")
        axes.legend(frameon=False)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
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
