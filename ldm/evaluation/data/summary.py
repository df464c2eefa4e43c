"""A data set's report as a table; docs/reading_the_numbers.md says what to do about it."""

from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table

from ldm.data.cache import shorten


def data_table(content: dict[str, Any]) -> Table:
    """Everything that is one number or one line."""
    table = Table(title=escape(content["name"]), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for section in _sections(content):
        for what, value in section.items():
            table.add_row(what, escape(value))
        table.add_section()
    return table


def _sections(content: dict[str, Any]) -> Iterator[dict[str, str]]:
    yield {
        "images": f"{content['num_images']:,}: {content['num_train']:,} train, {content['num_val']:,} validation",
        "resolution": f"{content['resolution']} x {content['resolution']} px",
        "size": f"{content['num_bytes']:,} bytes, prepared in {content['cache']}",
        "licence": content["licence"] or "not stated by the source",
        "unreadable": _listed([entry["name"] for entry in content["unreadable"]]),
        "colour profiles": content["colour_profiles"],
        "of one colour": _listed([image["name"] for image in content["blank"]]),
    }
    copies, near = content["copies"], content["near_duplicates"]
    alike = [*copies["groups"], *(pair["images"] for pair in near["pairs"])]
    yield {
        "copies, pixel by pixel": f"{copies['num_train']:,} within training, {copies['num_val_in_train']:,} "
        "validation images in training",
        "near duplicates": f"{near['num_train']:,} training and {near['num_val_in_train']:,} validation images "
        f"have one in training; up to {near['max_bits']} bits and {near['max_levels']:g} levels apart",
        "pairs": _listed([f"{first['name']} = {last['name']}" for first, *_, last in alike]),
    }
    if classes := content.get("classes"):
        (most, many), *_, (least, few) = [*classes["counts"].items()] * 2
        yield {
            "classes": f"{classes['num_classes']:,}, as good as {classes['effective_classes']:.1f} equal ones "
            f"(entropy {classes['entropy_bits']:.2f} bits)",
            "most and least": f"{most}: {many:,}; {least}: {few:,}",
            "without a class": f"{classes['num_missing']:,}",
        }
    if captions := content.get("captions"):
        yield {
            "captions": f"{captions['num_captions']:,}, {captions['num_distinct']:,} of them distinct",
            "words": f"{captions['fewest_words']} to {captions['most_words']}, median {captions['median_words']:g}",
            "most frequent": _frequent(captions["most_frequent"]),
            "most frequent words": _frequent(captions["most_frequent_words"], 10),
            "without a caption": f"{captions['num_missing']:,}",
        }
    if found := content.get("features"):
        part = {"features": found["network"]}
        if "density" in found:
            part["density"] = f"{found['density']:.3f} of validation by training (alike: 1)"
            part["coverage"] = f"{found['coverage']:.3f} (alike: {found['expected_coverage']:.3f})"
            part["k, N"] = f"{found['k']}, {found['num_compared']:,} of each; mean of {found['num_subsets']} draws"
        if "nearest_distance_val" in found:
            part["nearest training image"] = (
                f"{found['nearest_distance_val']:.3f} from validation, {found['nearest_distance_train']:.3f} from "
                "training, on average"
            )
        part["Vendi score"] = f"{found['vendi_score']:.1f} different images in effect, of {content['num_train']:,}"
        yield part


def _listed(names: list[str]) -> str:
    """How many there are, and the first of them."""
    return f"{len(names):,}" + (f": {shorten(names, 3)}" if names else "")


def _frequent(counts: dict[str, int], shown: int = 3) -> str:
    """The first of a table of counts, in words."""
    return ", ".join(f"{text} ({count:,})" for text, count in list(counts.items())[:shown])
