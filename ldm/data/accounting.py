"""Accounting of a data set: files used and skipped, captions, classes, and images that were converted."""

from collections import Counter
from typing import Any

from ldm.data.cache import count, shorten
from ldm.data.images import ImageData

PROFILES = {"converted": "colour profile", "unreadable": "unreadable colour profile, treated as sRGB"}
UNRECORDED = "prepared by an earlier version, which did not record the files that it skipped or converted"
MAX_CLASSES = 12
"""Data sets with more classes are described by their largest and smallest classes."""
ADVISED_BIT_DEPTHS = (10, 12, 14)
TRUNCATION = ("truncated", "longest", "max_tokens")


def account_for(images: ImageData) -> dict[str, Any]:
    """Count the files, captions and classes of a data set, as plain values for run.json."""
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
            rows.append(("truncated", describe_truncation(**{key: captions[key] for key in TRUNCATION})))
    if classes := accounts.get("classes"):
        rows.append(("classes", _describe_classes(classes["counts"], classes["missing"])))
    return [*rows, *(("note", note) for note in accounts["notes"])]


def describe_truncation(truncated: int, longest: int, max_tokens: int) -> str:
    """Describe how many captions are truncated."""
    number = f"{count(truncated, 'caption')}" if truncated else "no caption"
    return f"{number} truncated at max_tokens={max_tokens}; the longest has {longest} tokens"


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
