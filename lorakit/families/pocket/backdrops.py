"""The twelve scenes: each is a picture of S x S px with a range of heights for the object's foot."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from lorakit.families.pocket.spec import RGB

Rng = np.random.Generator
Ground = tuple[float, float]  # lowest and highest y of the object's foot, as shares of the frame


def mist(rng: Rng, cells: int, size: int) -> np.ndarray:
    """Smooth random field in [0, 1], (size, size)."""
    coarse = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255.0


def ramp(top: RGB, bottom: RGB, size: int) -> Image.Image:
    """Vertical gradient."""
    t = np.linspace(0.0, 1.0, size, dtype=np.float32)[:, None, None]
    column = np.array(top, np.float32) * (1 - t) + np.array(bottom, np.float32) * t
    return Image.fromarray(np.broadcast_to(column, (size, size, 3)).astype(np.uint8))


def grain(image: Image.Image, rng: Rng, cells: int, amount: float, top: float = 0.0) -> Image.Image:
    """Lighten and darken smoothly by up to `amount` (of 255) below the height `top`."""
    pixels = np.asarray(image, np.float32).copy()
    size = pixels.shape[0]
    start = int(top * size)
    pixels[start:] += ((mist(rng, cells, size) - 0.5) * 2 * amount)[start:, :, None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


class Brush:
    """ImageDraw with coordinates relative to the frame."""

    def __init__(self, image: Image.Image) -> None:
        self.size = image.width
        self.draw = ImageDraw.Draw(image)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: RGB) -> None:
        s = self.size
        self.draw.rectangle((round(x0 * s), round(y0 * s), round(x1 * s) - 1, round(y1 * s) - 1), fill=fill)

    def disc(self, x: float, y: float, rx: float, ry: float, fill: RGB) -> None:
        s = self.size
        self.draw.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill=fill)

    def shape(self, points: list[tuple[float, float]], fill: RGB) -> None:
        self.draw.polygon([(x * self.size, y * self.size) for x, y in points], fill=fill)

    def hills(self, height: float, swing: float, waves: float, phase: float, fill: RGB) -> None:
        xs = np.linspace(0, 1, 33)
        self.shape(
            [*((float(x), height + swing * math.sin(waves * x + phase)) for x in xs), (1.0, 1.0), (0.0, 1.0)], fill
        )


def _beach(rng: Rng, size: int) -> tuple[Image.Image, Ground]:
    image = ramp((110, 190, 245), (205, 232, 250), size)
    brush, horizon = Brush(image), rng.uniform(0.36, 0.46)
    brush.disc(rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.2), 0.08, 0.08, (255, 240, 130))
    brush.box(0, horizon, 1, 1, (30, 110, 190))
    brush.box(0, horizon + 0.1, 1, 1, (60, 160, 205))
    brush.hills(horizon + 0.22, 0.02, rng.uniform(5, 9), rng.uniform(0, 6), (238, 214, 150))
    return grain(image, rng, 20, 10, horizon + 0.22), (0.8, 0.95)


def _meadow(rng: Rng, size: int) -> tuple[Image.Image, Ground]:
    image = ramp((96, 176, 245), (200, 230, 250), size)
    brush, horizon = Brush(image), rng.uniform(0.48, 0.6)
    for _ in range(2):
        x, y = rng.uniform(0.05, 0.95), rng.uniform(0.08, 0.25)
        for shift in (-0.09, 0.0, 0.09):
            brush.disc(x + shift, y - (0.03 if shift == 0 else 0), 0.1, 0.06, (252, 252, 252))
    brush.hills(horizon, 0.05, rng.uniform(3, 6), rng.uniform(0, 6), (98, 186, 72))
    brush.hills(horizon + 0.16, 0.03, rng.uniform(4, 7), rng.uniform(0, 6), (76, 164, 58))
    return grain(image, rng, 28, 16, horizon), (0.8, 0.95)


def _snow(rng: Rng, size: int) -> tuple[Image.Image, Ground]:
    image = ramp((150, 170, 196), (205, 214, 226), size)
    brush, horizon = Brush(image), rng.uniform(0.46, 0.56)
    for _ in range(3):
        x, h = rng.uniform(0, 1), rng.uniform(0.2, 0.32)
        brush.shape([(x - 0.1, horizon + 0.04), (x, horizon - h), (x + 0.1, horizon + 0.04)], (72, 104, 104))
    brush.hills(horizon, 0.03, rng.uniform(3, 6), rng.uniform(0, 6), (232, 239, 248))
    for x, y in rng.random((26, 2)):
        brush.disc(float(x), float(y), 0.013, 0.013, (255, 255, 255))
    return grain(image, rng, 8, 8, horizon), (0.8, 0.95)


def _night(rng: Rng, size: int) -> tuple[Image.Image, Ground]:
    image = ramp((14, 18, 66), (56, 58, 128), size)
    brush = Brush(image)
    for x, y in rng.random((30, 2)):
        brush.disc(float(x), float(y) * 0.7, 0.012, 0.012, (250, 250, 225))
    x, y = rng.uniform(0.12, 0.88), rng.uniform(0.1, 0.22)
    brush.disc(x, y, 0.1, 0.1, (250, 246, 205))
    brush.disc(x + 0.05, y - 0.03, 0.08, 0.08, (22, 26, 76))
    brush.hills(rng.uniform(0.72, 0.78), 0.02, rng.uniform(3, 6), rng.uniform(0, 6), (40, 58, 74))
    return image, (0.84, 0.96)


def _table(rng: Rng, size: int) -> tuple[Image.Image, Ground]:
    image = ramp((228, 216, 196), (206, 190, 166), size)
    brush, edge = Brush(image), rng.uniform(0.5, 0.6)
    y, height, dark = edge, 0.07, False
    while y < 1:
        tone = int(rng.integers(-10, 11))
        brush.box(
            0, y, 1, y + height, (168 + tone, 110 + tone, 62 + tone) if not dark else (150 + tone, 96 + tone, 52 + tone)
        )
        brush.box(0, y, 1, y + 0.016, (104, 64, 36))
        y, height, dark = y + height, height * 1.35, not dark
    return grain(image, rng, 16, 8, edge), (0.8, 0.95)


def _brick(rng: Rng, size: int) -> tuple[Image.Image, Ground]:
    image = Image.new("RGB", (size, size), (214, 200, 186))
    brush, foot = Brush(image), rng.uniform(0.8, 0.86)
    height, width, shift = 0.105, 0.25, rng.uniform(0, 0.25)
    for row in range(int(foot / height) + 1):
        for column in range(-1, 5):
            tone = int(rng.integers(-14, 15))
            x = column * width + shift + (width / 2 if row % 2 else 0)
            brush.box(
                x, row * height, x + width - 0.025, (row + 1) * height - 0.025, (176 + tone, 78 + tone, 60 + tone)
            )
    brush.box(0, foot, 1, 1, (138, 132, 128))
    return grain(image, rng, 16, 6), (foot + 0.05, 0.96)


def _desert(rng: Rng, size: int) -> tuple[Image.Image, Ground]:
    image = ramp((250, 178, 100), (255, 232, 180), size)
    brush, horizon = Brush(image), rng.uniform(0.42, 0.52)
    x, h = rng.choice([rng.uniform(0.08, 0.2), rng.uniform(0.8, 0.92)]), horizon - 0.16
    for x0, y0, x1, y1 in (
        (-0.03, 0, 0.03, 0.3),
        (-0.12, 0.08, -0.07, 0.16),
        (-0.12, 0.13, 0.1, 0.18),
        (0.06, 0.04, 0.11, 0.18),
    ):
        brush.box(x + x0, h + y0, x + x1, h + y1, (84, 128, 66))
    brush.hills(horizon, 0.04, rng.uniform(3, 6), rng.uniform(0, 6), (232, 168, 92))
    brush.hills(horizon + 0.16, 0.05, rng.uniform(3, 5), rng.uniform(0, 6), (218, 148, 76))
    return grain(image, rng, 14, 6, horizon), (0.8, 0.95)


def _city(rng: Rng, size: int) -> tuple[Image.Image, Ground]:
    image = ramp((168, 190, 214), (226, 214, 206), size)
    brush, x = Brush(image), -0.05
    while x < 1:
        width, top, tone = rng.uniform(0.17, 0.24), rng.uniform(0.1, 0.4), int(rng.integers(84, 128))
        brush.box(x, top, x + width, 0.8, (tone, tone + 6, tone + 18))
        for wy in np.arange(top + 0.05, 0.7, 0.11):
            for wx in np.arange(x + 0.035, x + width - 0.05, 0.07):
                brush.box(wx, wy, wx + 0.035, wy + 0.055, (250, 226, 130))
        x += width
    brush.box(0, 0.78, 1, 1, (84, 84, 90))
    for i in range(4):
        brush.box(i * 0.28 + 0.05, 0.9, i * 0.28 + 0.19, 0.925, (236, 226, 170))
    return image, (0.84, 0.96)


def _underwater(rng: Rng, size: int) -> tuple[Image.Image, Ground]:
    image = ramp((70, 190, 222), (16, 86, 146), size)
    brush = Brush(image)
    for _ in range(2):
        x = rng.uniform(0, 1)
        brush.shape([(x, 0), (x + 0.12, 0), (x - 0.12, 0.8), (x - 0.32, 0.8)], (72, 178, 214))
    brush.hills(rng.uniform(0.84, 0.88), 0.02, rng.uniform(6, 10), rng.uniform(0, 6), (196, 180, 128))
    for x in (rng.uniform(0.02, 0.25), rng.uniform(0.75, 0.98)):
        ys = np.linspace(0.9, rng.uniform(0.45, 0.6), 12)
        sway = 0.03 * np.sin(ys * 26)
        brush.shape(
            [
                *((x + s - 0.025, y) for s, y in zip(sway, ys, strict=True)),
                *((x + s + 0.025, y) for s, y in zip(sway[::-1], ys[::-1], strict=True)),
            ],
            (30, 132, 84),
        )
    for x, y, r in rng.random((7, 3)):
        brush.disc(float(x), float(y) * 0.7, 0.014 + 0.02 * float(r), 0.014 + 0.02 * float(r), (176, 230, 246))
    return image, (0.78, 0.92)


def _forest(rng: Rng, size: int) -> tuple[Image.Image, Ground]:
    image = ramp((148, 190, 140), (186, 212, 160), size)
    brush = Brush(image)
    for i in range(6):
        x, width, tone = (i + rng.uniform(0.1, 0.9)) / 6, rng.uniform(0.03, 0.055), int(rng.integers(-14, 15))
        brush.box(x - width, 0, x + width, 0.8, (94 + tone, 68 + tone, 46 + tone))
    for x in np.arange(0, 1.01, 0.14):
        brush.disc(
            x + rng.uniform(-0.04, 0.04),
            rng.uniform(0.0, 0.1),
            0.14,
            0.14,
            (36, 100, 46) if rng.random() < 0.5 else (50, 122, 52),
        )
    brush.hills(rng.uniform(0.68, 0.74), 0.02, rng.uniform(4, 8), rng.uniform(0, 6), (72, 104, 46))
    return grain(image, rng, 24, 9), (0.82, 0.95)


_PAPERS: tuple[RGB, ...] = ((232, 232, 234), (210, 214, 222), (226, 218, 206), (216, 226, 218))


def _studio(rng: Rng, size: int) -> tuple[Image.Image, Ground]:
    r, g, b = _PAPERS[int(rng.integers(len(_PAPERS)))]
    image = ramp((r, g, b), (r - 10, g - 10, b - 10), size)
    return image, (0.8, 0.94)


def _floor(rng: Rng, size: int) -> tuple[Image.Image, Ground]:
    horizon = rng.uniform(0.46, 0.54)
    image = Image.new("RGB", (size, size), (206, 190, 222))
    brush = Brush(image)
    shift, rows = rng.uniform(-0.15, 0.15), [horizon, horizon + 0.07, horizon + 0.17, horizon + 0.32, 1.06]
    for i, (y0, y1) in enumerate(pairwise(rows)):
        for column in range(-6, 7):
            fill = (244, 244, 244) if (i + column) % 2 else (58, 58, 70)

            def at(c: float, y: float) -> tuple[float, float]:
                return 0.5 + (c + shift) * 0.42 * (0.25 + (y - horizon) * 1.5), y

            brush.shape([at(column, y0), at(column + 1, y0), at(column + 1, y1), at(column, y1)], fill)
    return image, (0.82, 0.95)


_PAINTERS: dict[str, Callable[[Rng, int], tuple[Image.Image, Ground]]] = {
    "beach": _beach, "meadow": _meadow, "snow": _snow, "night": _night, "table": _table, "brick": _brick,
    "desert": _desert, "city": _city, "underwater": _underwater, "forest": _forest, "studio": _studio, "floor": _floor,
}  # fmt: skip


def paint(scene: str, rng: Rng, size: int) -> tuple[Image.Image, Ground]:
    """The backdrop of a scene."""
    return _PAINTERS[scene](rng, size)
