"""Several pictures on one sheet, with a line or two of text beneath each. Draws; knows no file and no model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deployments.contracts import RGB

_GAP_PX = 8
_FONT_PX = 13
_LINE_PX = 17
_INK = (32, 32, 32)


def contact_sheet(pictures: Sequence[RGB], captions: Sequence[str] | None = None, columns: int | None = None) -> RGB:
    """[H, W, 3] uint8 each, of any sizes -> one such picture: a white grid, row by row, as square as it goes.

    captions: one a picture; it may have several lines, and is cut at the cell's width. columns: fixes their number.
    Raises ValueError for no pictures, or another number of captions.
    """
    if not pictures:
        raise ValueError("A contact sheet needs at least one picture.")
    if captions is not None and len(captions) != len(pictures):
        raise ValueError(f"{len(pictures)} pictures have {len(captions)} captions; give one each.")
    texts = list(captions) if captions is not None else [""] * len(pictures)
    across = min(columns or math.ceil(math.sqrt(len(pictures))), len(pictures))
    width, height = (max(picture.shape[axis] for picture in pictures) for axis in (1, 0))
    step = (width + _GAP_PX, height + _LINE_PX * max(_lines(text) for text in texts) + _GAP_PX)
    down = math.ceil(len(pictures) / across)
    sheet = Image.new("RGB", (across * step[0] + _GAP_PX, down * step[1] + _GAP_PX), "white")
    font = ImageFont.load_default(_FONT_PX)
    for number, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        left, top = (_GAP_PX + place * size for place, size in zip((number % across, number // across), step, strict=True))
        sheet.paste(Image.fromarray(picture), (left + (width - picture.shape[1]) // 2, top + (height - picture.shape[0]) // 2))
        draw = ImageDraw.Draw(sheet)
        for line, words in enumerate(text.splitlines()):
            draw.text((left, top + height + line * _LINE_PX + 2), _fitting(words, draw, font, width), fill=_INK, font=font)
    return np.array(sheet, dtype=np.uint8)


def _lines(text: str) -> int:
    return len(text.splitlines())


def _fitting(words: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, or as much of it as leaves room for the dots that say that there was more."""
    if draw.textlength(words, font=font) <= width:
        return words
    while words and draw.textlength(f"{words}…", font=font) > width:
        words = words[:-1]
    return f"{words}…"
