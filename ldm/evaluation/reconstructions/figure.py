"""The worst reconstructions of an autoencoder: each image above its reconstruction and their difference."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.data.images import ImageData
from ldm.image_grid import CELL, INK, MARGIN, PAPER, to_pil

AMPLIFIED = 4
"""Errors are shown so many times as bright as they are."""
GUTTER, HEADER, HEADING, GAP = 110, 36, 38, 10
PALE = (110, 110, 110)


def plot_reconstructions(
    originals: Tensor, reconstructions: Tensor, headings: Sequence[tuple[str, str]], title: str, *, columns: int = 6
) -> Image.Image:
    """Original, reconstruction and |error| of each image in one column, in bands of so many columns.

    Args:
        originals, reconstructions: [k, 3, H, W] in [-1, 1].
        headings: Two lines above each column: a figure, and what the image shows.
    """
    errors = AMPLIFIED * (originals - reconstructions).abs() - 1
    rows = [
        ("original", to_pil(originals)),
        ("reconstruction", to_pil(reconstructions)),
        (f"|error| x {AMPLIFIED}", to_pil(errors)),
    ]
    columns = min(columns, len(originals))
    band = HEADING + len(rows) * (CELL + MARGIN) + GAP
    font, large = ImageFont.load_default(13), ImageFont.load_default(15)
    width = max(GUTTER + columns * (CELL + MARGIN), round(large.getlength(title)) + 2 * MARGIN)
    canvas = Image.new("RGB", (width, HEADER + -(-len(originals) // columns) * band), PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN, HEADER // 2), title, fill=INK, font=large, anchor="lm")
    for first in range(0, len(originals), columns):
        top = HEADER + first // columns * band
        for row, (name, _) in enumerate(rows):
            middle = top + HEADING + row * (CELL + MARGIN) + CELL // 2
            pen.text((MARGIN, middle), name, fill=INK, font=font, anchor="lm")
        for i in range(first, min(first + columns, len(originals))):
            left = GUTTER + (i - first) * (CELL + MARGIN)
            for line, (text, colour) in enumerate(zip(headings[i], (INK, PALE), strict=True)):
                pen.text((left, top + 4 + 16 * line), _shorten_line(text, font), fill=colour, font=font)
            for row, (_, pictures) in enumerate(rows):
                enlarged = pictures[i].resize((CELL, CELL), Image.Resampling.BICUBIC)
                canvas.paste(enlarged, (left, top + HEADING + row * (CELL + MARGIN)))
    return canvas


def _shorten_line(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of a line as stands above one picture."""
    text = " ".join(text.split())
    if font.getlength(text) <= CELL:
        return text
    while text and font.getlength(text + "…") > CELL:
        text = text[:-1]
    return text.rstrip() + "…"


def image_text(images: ImageData, i: int) -> str:
    """What an image shows: its caption, else its class, else nothing."""
    if images.captions and (caption := images.captions[i]):
        return caption
    if images.labels and images.class_names and (of_class := images.labels[i]) is not None:
        return images.class_names[of_class]
    return ""
