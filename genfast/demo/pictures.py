"""Grids of digits as PNG files, and the letters of pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

ZOOM, GAP = 5, 2


def grid(images: Tensor, columns: int) -> np.ndarray:
    """uint8 [H, W]: images [N, 1, 8, 8] in [-1, 1] in rows of ``columns``, enlarged, dark on light."""
    pixels = ((1 - images.clamp(-1, 1)) * 127.5).round().byte().numpy()[:, 0]
    pixels = pixels.repeat(ZOOM, axis=1).repeat(ZOOM, axis=2)
    cell = pixels.shape[1] + GAP
    rows = -(-len(pixels) // columns)
    canvas = np.full((rows * cell + GAP, columns * cell + GAP), 200, np.uint8)
    for i, image in enumerate(pixels):
        top, left = GAP + i // columns * cell, GAP + i % columns * cell
        canvas[top : top + len(image), left : left + len(image)] = image
    return canvas


def save(canvas: np.ndarray, path: Path) -> None:
    """Write a grid as PNG."""
    from PIL import Image

    Image.fromarray(canvas).save(path)


def overview(strips: dict[str, Tensor], columns: int, path: Path) -> None:
    """One captioned strip of images per entry, below each other."""
    from PIL import Image, ImageDraw

    canvases = {name: grid(images, columns) for name, images in strips.items()}
    caption, width = 14, next(iter(canvases.values())).shape[1]
    height = sum(c.shape[0] + caption for c in canvases.values())
    page = Image.new("L", (width, height), 255)
    draw, top = ImageDraw.Draw(page), 0
    for name, canvas in canvases.items():
        draw.text((GAP, top + 1), name, fill=0)
        page.paste(Image.fromarray(canvas), (0, top + caption))
        top += canvas.shape[0] + caption
    page.save(path)


def font(size: int):
    """Pillow's own font, of this size where it has one of any size (from 10.1 on, built with FreeType)."""
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()
