"""A data set's report in words: a table, and what to do about what was found."""

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
    copies, near = content["copies"], content["near_duplicates"]
    yield {
        "images": f"{content['num_images']:,}: {content['num_train']:,} train, {content['num_val']:,} validation",
        "resolution": f"{content['resolution']} x {content['resolution']} px",
        "size": f"{content['num_bytes']:,} bytes, prepared in {content['cache']}",
        "licence": content["licence"] or "not stated by the source",
        "unreadable": f"{len(content['unreadable']):,}",
        "colour profiles": content["colour_profiles"],
        "of one colour": f"{len(content['blank']):,}",
    }
    yield {
        "copies, pixel by pixel": f"{copies['num_train']:,} within training, {copies['num_val_in_train']:,} "
        "validation images in training",
        "near duplicates": f"{near['num_train']:,} training and {near['num_val_in_train']:,} validation images "
        "have one in training",
        "": f"{near['num_pairs']:,} pairs up to {near['max_bits']} bits and {near['max_levels']} levels apart",
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
            "most frequent": frequent(captions["most_frequent"]),
            "most frequent words": frequent(captions["most_frequent_words"], 10),
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


def frequent(counts: dict[str, int], shown: int = 3) -> str:
    """The first of a table of counts, in words."""
    return ", ".join(f"{text} ({count:,})" for text, count in list(counts.items())[:shown])


def advice(content: dict[str, Any]) -> Iterator[str]:
    """What to do about what was found, one sentence or two for each."""

    def named(image: dict[str, Any]) -> str:
        return f"{image['name']} ({image['caption']})" if image.get("caption") else image["name"]

    def across(parts: list[list[dict[str, Any]]], between: str) -> str:
        crossing = [(p[0], p[-1]) for p in parts if p[0]["split"] == "val" and p[-1]["split"] == "train"]
        return shorten([f"{named(a)} {between} {named(b)}" for a, b in crossing], 3)

    num_train, num_val = content["num_train"], content["num_val"]
    if bad := content["unreadable"]:
        names = shorten([f"{entry['name']} ({entry['reason']})" for entry in bad], 3)
        yield f"{len(bad):,} files cannot be read and are left out: {names}. Repair or remove them."
    if blank := content["blank"]:
        yield f"{len(blank):,} images are of one colour: {shorten([named(i) for i in blank], 3)}. Remove them."
    copies, near = content["copies"], content["near_duplicates"]
    if count := copies["num_val_in_train"]:
        examples = across(copies["groups"], "=")
        yield (
            f"{count:,} validation images have the pixels of a training image: {examples}. They flatter every figure "
            "of validation: keep one file of each."
        )
    if count := near["num_val_in_train"]:
        examples = across([pair["images"] for pair in near["pairs"]], "and")
        yield (
            f"{count:,} of {num_val:,} validation images have a near duplicate in training: {examples}. Look at "
            "near_duplicates.png; where they show the same, keep one of each."
        )
    if count := copies["num_train"]:
        groups = [group for group in copies["groups"] if sum(i["split"] == "train" for i in group) > 1]
        examples = shorten([f"{named(group[-2])} = {named(group[-1])}" for group in groups], 3)
        yield (
            f"{count:,} training images repeat the pixels of another: {examples}. They count double and are the first "
            "to be learned by heart: remove them, unless their captions say different things on purpose."
        )
    if near["num_train"] > 0.1 * num_train:
        share = near["num_train"] / num_train
        yield f"{share:.0%} of the training images have a near duplicate in training: there is less here than it seems."
    classes, captions, found = (content.get(part) for part in ("classes", "captions", "features"))
    if classes:
        (most, many), *_, (least, few) = [*classes["counts"].items()] * 2
        if many > 10 * few:
            yield f"Class {most} has {many:,} images and class {least} {few:,}: add to the small ones or merge them."
    for what, part in (("class", classes), ("caption", captions)):
        if part and (count := part["num_missing"]):
            kind = "text" if what == "caption" else what
            yield f"{count:,} images have no {what}: give them one, for conditioning={kind} refuses to train without."
    if captions and captions["num_captions"]:
        caption, count = next(iter(captions["most_frequent"].items()))
        if count > max(1, 0.05 * captions["num_captions"]):
            yield f"{count:,} images share the caption {caption!r}: say what tells them apart, or text teaches little."
    if num_val < 50:
        yield f"Validation has {num_val} images, too few for steady figures: add images or raise data.val_fraction."
    if found and found.get("coverage", 1) < 0.9 * found.get("expected_coverage", 0):
        yield (
            f"Training images cover {found['coverage']:.0%} of validation in the feature space, where sets that are "
            f"alike cover {found['expected_coverage']:.0%}: validation shows things that training hardly has."
        )
