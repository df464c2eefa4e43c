"""Image grids with captions, and rows of images for side-by-side comparison."""

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
"""Side length of a displayed image, in pixels."""
MARGIN = 6
MAX_CAPTION_CHARACTERS = 400
"""Longer captions are truncated before layout; the two lines of a cell show far fewer characters."""
INK, PAPER = (40, 40, 40), (255, 255, 255)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert images [b, 3, H, W] in [-1, 1] to 8-bit PIL images."""
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
    """Arrange images in a grid, each scaled to `cell` pixels, with its caption below."""
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
        canvas.paste(_resize(image, cell), (left, top))
        if captions is not None:
            _draw_text(draw, captions[i] or "", (left, top + cell + 2), cell, font)
    return canvas


def _resize(image: Image.Image, cell: int) -> Image.Image:
    return image.convert("RGB").resize((cell, cell), Image.Resampling.BICUBIC)


def _draw_text(draw: ImageDraw.ImageDraw, text: str, position: tuple[int, int], width: int, font: Any) -> None:
    lines = "\n".join(_wrap(draw, text, width, font))
    draw.multiline_text(position, lines, fill=INK, font=font, spacing=2)


def _wrap(draw: ImageDraw.ImageDraw, text: str, width: int, font: Any, max_lines: int = 2) -> list[str]:
    """Wrap text to lines of about `width` pixels, with an ellipsis if it exceeds `max_lines` lines."""
    # fonts have no glyphs for control characters and lone surrogates
    printable = "".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in text[:MAX_CAPTION_CHARACTERS])
    columns = int(0.95 * width * len(printable) / max(1, draw.textlength(printable, font=font)))
    return textwrap.wrap(printable, max(1, columns), max_lines=max_lines, placeholder="…")


def labelled_rows(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    *,
    captions: Sequence[str | None] | None = None,
    cell: int = CELL,
) -> Image.Image:
    """Arrange (label, images) rows for comparison. Each column shows the same item, with its caption below."""
    font = ImageFont.load_default(13)
    columns = max(len(images) for _, images in rows)
    gutter, footer = 110, 34 if captions is not None else 0
    height = MARGIN + len(rows) * (cell + MARGIN)
    canvas = Image.new("RGB", (gutter + columns * (cell + MARGIN), height + footer), PAPER)
    draw = ImageDraw.Draw(canvas)
    for row, (label, images) in enumerate(rows):
        top = MARGIN + row * (cell + MARGIN)
        _draw_text(draw, label, (MARGIN, top + cell // 2 - 8), gutter - 2 * MARGIN, font)
        for column, image in enumerate(images):
            canvas.paste(_resize(image, cell), (gutter + column * (cell + MARGIN), top))
    for column, caption in enumerate(captions or ()):
        _draw_text(draw, caption or "", (gutter + column * (cell + MARGIN), height), cell, font)
    return canvas
