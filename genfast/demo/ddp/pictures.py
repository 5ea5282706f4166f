"""Loss over the steps for every wire, the bytes that each sends, and the time of a step."""

from __future__ import annotations

from pathlib import Path

from genfast.demo.ddp.train import Curve

WIDTH, HEIGHT, MARGIN, LINE = 760, 320, 16, 22
COLOURS = ("black", "gray", "blue", "green", "orange", "red", "purple", "brown")
BAR = 240


def size(curves: dict[str, Curve]) -> tuple[int, int]:
    """(width, height) of the picture."""
    return WIDTH, HEIGHT + (len(curves) + 2) * LINE + 2 * MARGIN


def smooth(losses: list[float]) -> list[float]:
    """Running means over a twentieth of the steps: those of single batches would hide each other."""
    window = max(1, len(losses) // 20)
    return [sum(losses[i : i + window]) / window for i in range(len(losses) - window + 1)]


def draw(curves: dict[str, Curve], path: Path) -> None:
    """A plot of the losses, and a table of bars below it."""
    from PIL import Image, ImageDraw

    page = Image.new("RGB", size(curves), "white")
    pen = ImageDraw.Draw(page)
    smoothed = {name: smooth(curve.losses) for name, curve in curves.items()}
    top = max(max(line) for line in smoothed.values())
    low = min(min(line) for line in smoothed.values())
    pen.text((MARGIN, 2), f"loss, from {top:.3f} down to {low:.3f} (running mean)", fill="black")
    pen.rectangle([MARGIN, MARGIN, WIDTH - MARGIN, HEIGHT], outline="gray")
    for (_, line), colour in zip(smoothed.items(), COLOURS):
        across = (WIDTH - 2 * MARGIN) / max(1, len(line) - 1)
        down = (HEIGHT - MARGIN) / ((top - low) or 1)
        points = [(MARGIN + i * across, MARGIN + (top - value) * down) for i, value in enumerate(line)]
        pen.line(points * 2 if len(points) == 1 else points, fill=colour, width=2)
    y = HEIGHT + MARGIN
    columns = MARGIN, 130, 220, 220 + BAR + 10
    for x, title in zip(columns, ("", "final loss", "bytes sent in a step", "ms of a step")):
        pen.text((x, y), title, fill="black")
    most, longest = (max(getattr(c, what) for c in curves.values()) or 1 for what in ("sent_bytes", "step_ms"))
    for (name, curve), colour in zip(curves.items(), COLOURS):
        y += LINE
        pen.text((columns[0], y), name, fill=colour)
        pen.text((columns[1], y), f"{curve.final:.5f}", fill="black")
        for x, part, text in (
            (columns[2], curve.sent_bytes / most, f"{curve.sent_bytes:,}"),
            (columns[3], curve.step_ms / longest, f"{curve.step_ms:.2f}"),
        ):
            pen.rectangle([x, y, x + part * (BAR - 40), y + LINE - 8], fill="lightsteelblue")
            pen.text((x + 4, y), text, fill="black")
    page.save(path)
