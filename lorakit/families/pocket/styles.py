"""The five styles of a scene: from its layers (at twice the size) to the finished picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFilter

if TYPE_CHECKING:
    from lorakit.families.pocket.layers import Layers

Rng = np.random.Generator
GREY = np.array([0.3, 0.59, 0.11], np.float32)


def shrink(pixels: np.ndarray) -> np.ndarray:
    """Average 2 x 2 blocks: (S, S, ...) to (S/2, S/2, ...)."""
    mean: np.ndarray = (pixels[0::2, 0::2] + pixels[1::2, 0::2] + pixels[0::2, 1::2] + pixels[1::2, 1::2]) * 0.25
    return mean


def outlines(parts: np.ndarray, width: int) -> np.ndarray:
    """True along the borders between polygons."""
    edge = np.zeros(parts.shape, bool)
    edge[:-1] |= parts[:-1] != parts[1:]
    edge[:, :-1] |= parts[:, :-1] != parts[:, 1:]
    for axis in (0, 1):
        for offset in range(1, width):
            edge |= np.roll(edge, offset - width // 2, axis)
    return edge


def composite(layers: Layers, colour: np.ndarray) -> np.ndarray:
    """The object in front of its backdrop."""
    return np.where(layers.mask[:, :, None] > 0, colour, layers.backdrop)


def shade(layers: Layers, rng: Rng) -> np.ndarray:
    """The scene with light from above, left or right, and a shadow on the ground."""
    canvas = layers.mask.shape[0]
    radius = layers.half * canvas * 0.3
    soft = Image.fromarray((layers.mask * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(radius))
    height = np.asarray(soft.filter(ImageFilter.BoxBlur(radius * 0.6)), np.float32) / 255.0
    gy, gx = np.gradient(height)
    side = 1.0 if rng.random() < 0.5 else -1.0
    light = (gy * 0.8 + gx * 0.6 * side) * layers.half * canvas
    colour = (
        layers.colour * np.clip(0.93 + 0.45 * light, 0.5, 1.25)[:, :, None]
        + 70 * np.clip(light - 0.3, 0, 1)[:, :, None]
    )
    (x, y), axis = layers.middle, np.linspace(0, 1, canvas, dtype=np.float32)
    across, down = (
        ((axis - x - 0.1 * side * layers.half) / (layers.half * 0.95)) ** 2,
        ((axis - y - layers.half * 0.98) / (layers.half * 0.2)) ** 2,
    )
    shadow = 1 - 0.5 * np.exp(-((across[None, :] + down[:, None]) ** 1.5))
    return np.where(layers.mask[:, :, None] > 0, colour, layers.backdrop * shadow[:, :, None])


def photo(layers: Layers, rng: Rng) -> np.ndarray:
    """Light, shadow, a darker rim and a little noise."""
    pixels = shrink(shade(layers, rng))
    axis = np.linspace(-1, 1, pixels.shape[0], dtype=np.float32) ** 2
    return pixels * rng.uniform(0.94, 1.05) * (1 - 0.09 * (axis[:, None] + axis[None, :]))[:, :, None] + rng.normal(
        0, 1.5, (*pixels.shape[:2], 1)
    )


def sketch(layers: Layers, rng: Rng) -> np.ndarray:
    """Pencil lines on paper; colours remain as a wash (strong on the object), so that prompts can ask for them."""
    grey = layers.backdrop @ GREY
    gy, gx = np.gradient(np.asarray(Image.fromarray(grey.astype(np.uint8)).filter(ImageFilter.BoxBlur(1)), np.float32))
    lines = np.clip(np.hypot(gx, gy) / 40 - 0.1, 0, 1)[:, :, None] * 0.5
    paper, pencil = np.array((250, 247, 238), np.float32), np.array((62, 60, 66), np.float32)
    pixels = (paper * 0.8 + layers.backdrop * 0.2) * (1 - lines) + pencil * lines
    pixels = np.where(layers.mask[:, :, None] > 0, paper * 0.3 + layers.colour * 0.7, pixels)
    return shrink(np.where(outlines(layers.parts, layers.mask.shape[0] // 64)[:, :, None], pencil, pixels))


def pixel(layers: Layers, rng: Rng) -> np.ndarray:
    """Blocks of one 21st of the frame in few colours."""
    canvas = layers.mask.shape[0]
    size = canvas // 2
    block = max(1, round(size / 21))
    count = -(-size // block)
    image = Image.fromarray(np.clip(composite(layers, layers.colour), 0, 255).astype(np.uint8))
    small = image.filter(ImageFilter.BoxBlur(size / 64)).resize((count, count), Image.Resampling.NEAREST)
    colours = np.round(np.asarray(small, np.float32) / 42.0) * 42.0
    return np.repeat(np.repeat(colours, block, 0), block, 1)[:size, :size]


def flat(layers: Layers, rng: Rng) -> np.ndarray:
    """A cartoon: no light, pale backdrop, a thick dark outline around every part."""
    canvas = layers.mask.shape[0]
    smooth = Image.fromarray(layers.backdrop.astype(np.uint8)).filter(ImageFilter.MedianFilter(5))
    backdrop = np.asarray(smooth, np.float32) * 0.72 + 74
    pixels = np.where(layers.mask[:, :, None] > 0, layers.colour, backdrop)
    return shrink(np.where(outlines(layers.parts, canvas // 40)[:, :, None], 22.0, pixels))


def painting(layers: Layers, rng: Rng) -> np.ndarray:
    """Slanted strokes with smeared, more saturated colours."""
    canvas = layers.mask.shape[0]
    pixels = shade(layers, rng)
    ys, xs = np.mgrid[0:canvas, 0:canvas]
    unit = canvas / 128
    stroke = ((xs + ys) // (6 * unit)).astype(np.int64) * 97 + ((xs - ys) // (14 * unit)).astype(np.int64)
    dice = rng.random((1024, 3), dtype=np.float32)[np.mod(stroke, 1024)]
    drag = ((dice[:, :, 0] - 0.5) * 5 * unit).astype(np.int64)
    pixels = pixels[np.clip(ys - drag, 0, canvas - 1), np.clip(xs + drag, 0, canvas - 1)]
    mean = (pixels @ GREY)[:, :, None]
    return shrink((mean + (pixels - mean) * 1.3) * 1.02 + (dice[:, :, 1:2] - 0.5) * 60)


_MANNERS: dict[str, Callable[[Layers, Rng], np.ndarray]] = {
    "photo": photo, "sketch": sketch, "pixel": pixel, "flat": flat, "painting": painting,
}  # fmt: skip


def apply(manner: str, layers: Layers, rng: Rng) -> Image.Image:
    """The finished picture."""
    return Image.fromarray(np.clip(_MANNERS[manner](layers, rng), 0, 255).astype(np.uint8))
