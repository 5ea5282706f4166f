"""Text whose characters are coloured by the step at which they were written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from genfast.demo.pictures import font as letters

COLUMNS = 64
CELL, LINE, MARGIN, CAPTION, GAP = 13, 20, 12, 24, 8
# From early to late: blue, green, yellow, red, all light enough for black letters.
COLOURS = ((92, 140, 255), (86, 214, 180), (250, 228, 96), (255, 122, 92))
PROMPT = (225, 225, 225)


class Panel(NamedTuple):
    """Texts of one sampler."""

    title: str
    texts: Sequence[str]
    orders: Sequence[Sequence[int]]
    """For every character the step, from 1, at which it was written; 0 for those given."""
    steps: int


def colour(part: float) -> tuple[int, int, int]:
    """The colour of a part in [0, 1] of the steps."""
    place = min(max(part, 0.0), 1.0) * (len(COLOURS) - 1)
    i = min(int(place), len(COLOURS) - 2)
    return tuple(round(a + (b - a) * (place - i)) for a, b in zip(COLOURS[i], COLOURS[i + 1]))


def size(panels: Sequence[Panel]) -> tuple[int, int]:
    """(width, height) of the picture of these panels."""
    height = sum(CAPTION + sum(_lines(text) * LINE + GAP for text in panel.texts) for panel in panels)
    return 2 * MARGIN + COLUMNS * CELL, 2 * MARGIN + CAPTION + height


def draw(panels: Sequence[Panel], path: Path) -> None:
    """One panel below the other, each with its texts in cells, a line break as an arrow; a legend first."""
    from PIL import Image, ImageDraw

    page = Image.new("RGB", size(panels), "white")
    pen, font = ImageDraw.Draw(page), letters(14)
    top = MARGIN
    pen.text((MARGIN, top), "written first", fill="black", font=font)
    bar = MARGIN + 90
    for i in range(256):
        pen.line([(bar + i, top), (bar + i, top + 12)], fill=colour(i / 255))
    pen.text((bar + 266, top), "last", fill="black", font=font)
    pen.rectangle([bar + 330, top, bar + 350, top + 12], fill=PROMPT)
    pen.text((bar + 358, top), "given", fill="black", font=font)
    top += CAPTION
    for panel in panels:
        pen.text((MARGIN, top + 6), panel.title, fill="black", font=font)
        top += CAPTION
        for text, order in zip(panel.texts, panel.orders):
            for i, (character, step) in enumerate(zip(text, order)):
                x, y = MARGIN + i % COLUMNS * CELL, top + i // COLUMNS * LINE
                fill = colour((step - 1) / max(1, panel.steps - 1)) if step else PROMPT
                pen.rectangle([x, y, x + CELL - 1, y + LINE - 1], fill=fill)
                if character == "\n":
                    pen.line([(x + 9, y + 5), (x + 9, y + 13), (x + 3, y + 13)], fill="black")
                    pen.line([(x + 6, y + 10), (x + 3, y + 13), (x + 6, y + 16)], fill="black")
                else:
                    pen.text((x + (CELL - font.getlength(character)) / 2, y + 1), character, fill="black", font=font)
            top += _lines(text) * LINE + GAP
    page.save(path)


def _lines(text: str) -> int:
    return -(-len(text) // COLUMNS)
