"""Pictures that people look at: grids with captions, rows that compare, film strips."""

import math
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 128
MARGIN = 6
LONGEST_CAPTION = 400
"""Signs of a caption that are looked at; two lines of a cell hold far fewer."""
INK, PAPER = (40, 40, 40), (255, 255, 255)


def to_pil(images: Tensor) -> list[Image.Image]:
    """[b, 3, H, W] in [-1, 1] -> 8-bit pictures."""
    pixels = ((images.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(np.ascontiguousarray(image)) for image in pixels.permute(0, 2, 3, 1).numpy()]


def grid(
    images: Sequence[Image.Image],
    captions: Sequence[str | None] | None = None,
    *,
    columns: int | None = None,
    title: str | None = None,
    cell: int = CELL,
) -> Image.Image:
    """Pictures in rows, each with its caption below; small ones are enlarged to `cell` pixels."""
    columns = columns or max(1, math.ceil(math.sqrt(len(images))))
    rows = math.ceil(len(images) / columns)
    font = ImageFont.load_default(12)
    label_height = 32 if captions is not None else 0
    header = 26 if title else 0
    width = columns * (cell + MARGIN) + MARGIN
    canvas = Image.new("RGB", (width, header + rows * (cell + label_height + MARGIN) + MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((MARGIN, 6), title, fill=INK, font=ImageFont.load_default(14))
    for i, image in enumerate(images):
        left = MARGIN + (i % columns) * (cell + MARGIN)
        top = header + MARGIN + (i // columns) * (cell + label_height + MARGIN)
        canvas.paste(_enlarge(image, cell), (left, top))
        if captions is not None:
            _write(draw, captions[i] or "", (left, top + cell + 2), cell, font)
    return canvas


def _enlarge(image: Image.Image, cell: int) -> Image.Image:
    return image.convert("RGB").resize((cell, cell), Image.Resampling.BICUBIC)


def _write(draw: ImageDraw.ImageDraw, text: str, place: tuple[int, int], width: int, font: Any) -> None:
    lines = "\n".join(_wrap(draw, text, width, font))
    draw.multiline_text(place, lines, fill=INK, font=font, spacing=2)


def _wrap(draw: ImageDraw.ImageDraw, text: str, width: int, font: Any, lines: int = 2) -> list[str]:
    """At most `lines` lines of about `width` pixels, cut with an ellipsis."""
    # no font has control signs, and a line of the length of a page need not be measured
    shown = "".join(" " if unicodedata.category(sign) in ("Cc", "Cs") else sign for sign in text[:LONGEST_CAPTION])
    columns = int(0.95 * width * len(shown) / max(1, draw.textlength(shown, font=font)))
    return textwrap.wrap(shown, max(1, columns), max_lines=lines, placeholder="…")


def rows(
    named: Sequence[tuple[str, Sequence[Image.Image]]],
    *,
    captions: Sequence[str | None] | None = None,
    cell: int = CELL,
) -> Image.Image:
    """One row per name, so that what belongs together stands in one column, with the column's caption below it."""
    font = ImageFont.load_default(13)
    columns = max(len(images) for _, images in named)
    gutter, footer = 110, 34 if captions is not None else 0
    height = MARGIN + len(named) * (cell + MARGIN)
    canvas = Image.new("RGB", (gutter + columns * (cell + MARGIN), height + footer), PAPER)
    draw = ImageDraw.Draw(canvas)
    for row, (name, images) in enumerate(named):
        top = MARGIN + row * (cell + MARGIN)
        _write(draw, name, (MARGIN, top + cell // 2 - 8), gutter - 2 * MARGIN, font)
        for column, image in enumerate(images):
            canvas.paste(_enlarge(image, cell), (gutter + column * (cell + MARGIN), top))
    for column, caption in enumerate(captions or ()):
        _write(draw, caption or "", (gutter + column * (cell + MARGIN), height), cell, font)
    return canvas
