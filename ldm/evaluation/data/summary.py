"""The summary table of a data set report. docs/your_own_images.md explains what to do about the findings."""

from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table

from ldm.data.accounting import accounting_rows
from ldm.data.cache import shorten


def data_table(content: dict[str, Any]) -> Table:
    """Return a table of all values that fit on one line."""
    table = Table(title=escape(content["name"]), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for section in _sections(content):
        for label, value in section.items() if isinstance(section, dict) else section:
            table.add_row(label, escape(value))
        table.add_section()
    return table


def _sections(content: dict[str, Any]) -> Iterator[dict[str, str] | list[tuple[str, str]]]:
    yield [
        *accounting_rows(content["accounting"]),
        ("prepared in", content["cache"]),
        ("unreadable", _count_and_names([entry["name"] for entry in content["unreadable"]])),
        ("single colour", _count_and_names([image["name"] for image in content["blank"]])),
    ]
    copies, near = content["copies"], content["near_duplicates"]
    pairs = [*copies["groups"], *(pair["images"] for pair in near["pairs"])]
    yield {
        "exact copies": f"{copies['num_train']:,} within the training split; {copies['num_val_in_train']:,} "
        "validation images have a copy in the training split",
        "near duplicates": f"{near['num_train']:,} training and {near['num_val_in_train']:,} validation images have "
        f"a near duplicate in the training split (at most {near['max_bits']} hash bits and {near['max_levels']:g} grey "
        "levels apart)",
        "pairs": _count_and_names([f"{first['name']} = {last['name']}" for first, *_, last in pairs]),
    }
    if classes := content.get("classes"):
        (largest, num_largest), *_, (smallest, num_smallest) = [*classes["counts"].items()] * 2
        yield {
            "classes": f"{classes['num_classes']:,}, effective number {classes['effective_classes']:.1f} "
            f"(entropy {classes['entropy_bits']:.2f} bits)",
            "largest and smallest": f"{largest}: {num_largest:,}; {smallest}: {num_smallest:,}",
            "without a class": f"{classes['num_missing']:,}",
        }
    if captions := content.get("captions"):
        yield {
            "captions": f"{captions['num_captions']:,}, {captions['num_distinct']:,} of them distinct",
            "words per caption": f"{captions['fewest_words']} to {captions['most_words']}, median "
            f"{captions['median_words']:g}",
            "most frequent captions": _format_counts(captions["most_frequent"]),
            "most frequent words": _format_counts(captions["most_frequent_words"], 10),
            "without a caption": f"{captions['num_missing']:,}",
        }
    if features := content.get("features"):
        section = {"features": features["network"]}
        if "density" in features:
            section["density"] = f"{features['density']:.3f} (expected for identical distributions: 1)"
            section["coverage"] = (
                f"{features['coverage']:.3f} (expected for identical distributions: "
                f"{features['expected_coverage']:.3f})"
            )
            section["k and N"] = (
                f"k = {features['k']}, {features['num_compared']:,} images per split; mean over "
                f"{features['num_subsets']} training subsets"
            )
        if "nearest_distance_val" in features:
            section["distance to nearest training image"] = (
                f"mean {features['nearest_distance_val']:.3f} from validation images, "
                f"{features['nearest_distance_train']:.3f} from training images"
            )
        section["Vendi score"] = (
            f"{features['vendi_score']:.1f} effectively distinct images out of {content['num_train']:,}"
        )
        yield section


def _count_and_names(names: list[str]) -> str:
    """Format the number of names and the first three names."""
    return f"{len(names):,}" + (f": {shorten(names, 3)}" if names else "")


def _format_counts(counts: dict[str, int], num_shown: int = 3) -> str:
    """Format the first `num_shown` texts, each with its count."""
    return ", ".join(f"{text} ({count:,})" for text, count in list(counts.items())[:num_shown])
