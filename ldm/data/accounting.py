"""Accounting of a data set: files used and skipped, captions, classes, and images that were converted."""

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ldm.data.cache import count, shorten
from ldm.data.images import ImageData
from ldm.files.untrusted import replace_surrogates

PROFILES = {"converted": "colour profile", "unreadable": "unreadable colour profile, treated as sRGB"}
UNRECORDED = "prepared by an earlier version, which did not record the files that it skipped or converted"
MAX_CLASSES = 12
"""Data sets with more classes are described by their largest and smallest classes."""
ADVISED_BIT_DEPTHS = (10, 12, 14)


def account_for(images: ImageData, tokenizer: Any = None, max_tokens: int = 0) -> dict[str, Any]:
    """Count the files, captions and classes of a data set, as plain values for run.json.

    Args:
        tokenizer: Tokenizer of a text encoder. If given, captions with more than `max_tokens` tokens are counted.
    """
    preparation = images.preparation
    skipped = preparation.get("skipped") or ({"cannot be read": images.num_skipped} if images.num_skipped else {})
    accounts: dict[str, Any] = {
        "resolution": images.resolution,
        "megabytes": images.num_bytes / 1e6,
        "licence": images.licence,
        "files": len(images) + sum(skipped.values()),
        "used": len(images),
        "train": len(images.train_indices),
        "validation": len(images.val_indices),
        "skipped": skipped,
        "converted": preparation.get("converted", {}) | {PROFILES[kind]: n for kind, n in images.profiles.items()},
        "notes": list(preparation.get("notes", [UNRECORDED])),
    }
    if images.captions is not None:
        present = sum(caption is not None for caption in images.captions)
        missing, several = len(images) - present, len(images.more_captions)
        accounts["captions"] = {"present": present, "missing": missing, "several": several}
        if tokenizer is not None:
            texts = itertools.chain.from_iterable(images.captions_of(i) for i in range(len(images)))
            accounts["captions"] |= {**_count_truncated(tokenizer, texts, max_tokens), "max_tokens": max_tokens}
        if missing:
            have = "image has" if missing == 1 else "images have"
            accounts["notes"].append(
                f"{missing:,} {have} no caption, so the set cannot be used with conditioning on text"
            )
    if images.labels is not None:
        by_label = Counter(images.labels)
        missing = by_label.pop(None, 0)
        names = images.class_names or [str(label) for label in range(max(filter(None, by_label), default=0) + 1)]
        counts = {name: by_label[label] for label, name in enumerate(names)}
        accounts["classes"] = {"counts": counts, "missing": missing}
        trained = {images.labels[i] for i in images.train_indices}
        if untrained := [name for label, name in enumerate(names) if label not in trained]:
            noun = "class has" if len(untrained) == 1 else "classes have"
            accounts["notes"].append(f"{len(untrained):,} {noun} no training image: {shorten(untrained)}")
    if num_dark := preparation.get("dark_16_bit"):
        largest = preparation["max_16_bit"]
        advised = next((bits for bits in ADVISED_BIT_DEPTHS if largest < 2**bits), None)
        remedy = f"; data.bit_depth={advised} would use the full range" if advised else ""
        accounts["notes"].append(
            f"{count(num_dark, '16-bit grey image')} with no value above 4095: nearly black, as 65535 is white{remedy}"
        )
    return accounts


def accounting_rows(accounts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the labels and values of the accounting table."""
    rows = [
        ("size", f"{accounts['resolution']} x {accounts['resolution']} px, {accounts['megabytes']:,.3g} MB"),
        ("licence", accounts["licence"] or "not stated by the source"),
        ("files", f"{accounts['files']:,}"),
        ("used", f"{accounts['used']:,}: {accounts['train']:,} train, {accounts['validation']:,} validation"),
        ("skipped", _format_counts(accounts["skipped"])),
        ("converted", _format_counts(accounts["converted"])),
    ]
    if captions := accounts.get("captions"):
        several = f"; {count(captions['several'], 'image')} with several" if captions["several"] else ""
        rows.append(("captions", f"{captions['present']:,} present, {captions['missing']:,} missing{several}"))
        if "max_tokens" in captions:
            number = count(captions["truncated"], "caption") if captions["truncated"] else "none"
            limit, longest = captions["max_tokens"], captions["longest"]
            rows.append(("truncated", f"{number} at max_tokens={limit}; the longest has {longest} tokens"))
    if classes := accounts.get("classes"):
        rows.append(("classes", _describe_classes(classes["counts"], classes["missing"])))
    return [*rows, *(("note", note) for note in accounts["notes"])]


def _count_truncated(tokenizer: Any, captions: Iterable[str], max_tokens: int) -> dict[str, int]:
    """Return the number of captions longer than `max_tokens`, and the number of tokens of the longest caption."""
    lengths, remaining = [0], map(replace_surrogates, captions)
    while texts := list(itertools.islice(remaining, 1024)):
        lengths += map(len, tokenizer(texts, truncation=False, verbose=False)["input_ids"])
    return {"truncated": sum(length > max_tokens for length in lengths), "longest": max(lengths)}


def _format_counts(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{number:,} {kind}" for kind, number in ordered) or "none"


def _describe_classes(counts: dict[str, int], num_missing: int) -> str:
    texts = [f"{name} {number:,}" for name, number in counts.items()]
    if len(counts) > MAX_CLASSES:
        ordered = sorted(counts.items(), key=lambda item: -item[1])
        largest, smallest = ([f"{name} {number:,}" for name, number in part] for part in (ordered[:3], ordered[-3:]))
        texts = [f"largest {shorten(largest)}", f"smallest {shorten(smallest)}"]
    missing = f"; {count(num_missing, 'image')} without a class" if num_missing else ""
    return f"{len(counts):,} ({', '.join(texts)}){missing}"
