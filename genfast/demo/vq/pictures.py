"""One page: digits and what their codes give back, how often each code is used, and what stage two writes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genfast.demo.data import CLASSES
from genfast.demo.pictures import font, grid
from genfast.demo.vq.autoencoder import Autoencoder

COLUMNS = 20
MARGIN, CAPTION, LETTERS = 16, 26, 14
BARS, PATCH = 150, 5
BLUE, ORANGE, INK = (66, 110, 214), (242, 142, 43), (40, 40, 40)


class Page(NamedTuple):
    """What is drawn."""

    originals: Tensor
    """[COLUMNS, 1, 8, 8], and alike:"""
    reconstructions: Tensor
    samples: Tensor
    """[N, 1, 8, 8], in rows of COLUMNS, a class each."""
    usage: tuple[Tensor, Tensor]
    """int64 [K], how often each code is used by real digits and by samples."""
    patches: Tensor
    """uint8 [K, 2, 2]: what each code looks like."""
    figures: tuple[str, str, str]
    """What is said of the reconstructions, of the codes and of the samples."""


def code_patches(auto: Autoencoder) -> Tensor:
    """uint8 [K, 2, 2], dark on light: a patch in the middle of a picture that has one code everywhere."""
    everywhere = torch.arange(len(auto.codebook))[:, None].expand(-1, 16)
    return ((1 - auto.decode(everywhere)[:, 0, 2:4, 2:4]) * 127.5).round().byte()


def draw(page: Page, path: Path) -> None:
    """The page as PNG."""
    from PIL import Image, ImageDraw

    both = [_image(grid(images, COLUMNS)) for images in (page.originals, page.reconstructions)]
    samples = _image(grid(page.samples, COLUMNS))
    width, patches = both[0].width, PATCH * 2 + 6
    parts = (both[0].height + both[1].height, BARS + patches, samples.height)
    sheet = Image.new("RGB", (width + 2 * MARGIN, 2 * MARGIN + 3 * CAPTION + sum(parts) + 2 * MARGIN), "white")
    pen, letters, top = ImageDraw.Draw(sheet), font(LETTERS), MARGIN

    pen.text((MARGIN, top), f"held-out digits, and what their codes give back: {page.figures[0]}", INK, letters)
    top += CAPTION
    for strip in both:
        sheet.paste(strip, (MARGIN, top))
        top += strip.height
    top += MARGIN

    x = MARGIN
    for text, colour in ((f"codes of the digits: {page.figures[1]}", BLUE), ("of the samples", ORANGE)):
        pen.rectangle([x, top + 3, x + 10, top + 13], colour)
        pen.text((x + 16, top), text, INK, letters)
        x += round(pen.textlength(text, letters)) + 40
    top += CAPTION
    _bars(sheet, pen, page, (MARGIN, top, width))
    top += BARS + patches + MARGIN

    pen.text((MARGIN, top), f"samples of stage two: {page.figures[2]}", INK, letters)
    sheet.paste(samples, (MARGIN, top + CAPTION))
    sheet.save(path)


def _bars(sheet, pen, page: Page, box: tuple[int, int, int]) -> None:
    """Shares of each code, the most used first, on a line with what it looks like below."""
    from PIL import Image

    left, top, width = box
    shares = [(counts / counts.sum().clamp_min(1)).numpy() for counts in page.usage]
    highest = max(float(share.max()) for share in shares)
    pitch, floor = width / len(shares[0]), top + BARS - 1
    for place, code in enumerate(np.argsort(-shares[0], kind="stable")):
        x = left + place * pitch
        for share, colour, begin, end in zip(shares, (BLUE, ORANGE), (0.08, 0.5), (0.46, 0.86)):
            high = round(share[code] / highest * (BARS - 8))
            if high:
                pen.rectangle([round(x + begin * pitch), floor - high, round(x + end * pitch) - 1, floor - 1], colour)
        patch = Image.fromarray(page.patches[code].numpy()).resize((2 * PATCH, 2 * PATCH), Image.Resampling.NEAREST)
        at = round(x + pitch / 2) - PATCH, floor + 4
        pen.rectangle([at[0] - 1, at[1] - 1, at[0] + 2 * PATCH, at[1] + 2 * PATCH], (200, 200, 200))
        sheet.paste(patch, at)
    pen.line([left, floor, left + width, floor], INK)
    level = floor - round(1 / len(shares[0]) / highest * (BARS - 8))
    pen.line([left, level, left + width, level], (150, 150, 150))
    pen.text(
        (left + width - pen.textlength("all alike", font(LETTERS - 2)), level - 17), "all alike", INK, font(LETTERS - 2)
    )


def by_class(images: Tensor, labels: Tensor, count: int) -> Tensor:
    """The first ``count`` images of every class, class by class, blank where there are fewer."""
    rows = []
    for c in range(CLASSES):
        found = images[labels == c][:count]
        rows.append(torch.cat([found, -torch.ones(count - len(found), *images.shape[1:])]))
    return torch.cat(rows)


def _image(canvas: np.ndarray):
    from PIL import Image

    return Image.fromarray(canvas).convert("RGB")
