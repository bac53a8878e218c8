"""Flip and jitter photos: pure functions of (seed, photo, variant), so that variants can be cached.

Variant 0 is the photo without augmentation. With `data.flip` every odd variant is mirrored.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from lorakit.config import DataConfig
from lorakit.data.buckets import Bucket, Placement
from lorakit.data.decode import Pixels

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Variant:
    """One crop and colouring of a photo.

    Attributes:
        bucket: size of the result.
        box: (left, top, right, bottom) of the crop in the upright photo, before the flip.
        flip: whether the crop is mirrored.
        brightness, contrast, saturation: factors; 1 changes nothing.
    """

    bucket: Bucket
    box: Box
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


def of_photo(size: tuple[int, int], placement: Placement, config: DataConfig, seed: int, name: str) -> list[Variant]:
    """All variants of a photo of `size` (width, height). The first has no augmentation."""
    return [_variant(size, placement, config, random.Random(f"{seed}/{name}/{n}"), n) for n in range(config.variants)]


def _variant(
    size: tuple[int, int], placement: Placement, config: DataConfig, draw: random.Random, number: int
) -> Variant:
    if number == 0:
        return Variant(placement.bucket, placement.box)
    box = _jitter_box(size, placement.box, config.crop_jitter, draw)
    low, width = 1 - config.color_jitter, 2 * config.color_jitter
    brightness, contrast, saturation = (low + width * draw.random() for _ in range(3))
    return Variant(placement.bucket, box, config.flip and number % 2 == 1, brightness, contrast, saturation)


def _jitter_box(size: tuple[int, int], box: Box, jitter: float, draw: random.Random) -> Box:
    """Shrink the box by up to `jitter` and move it by up to `jitter` of its side, within the photo."""
    if jitter == 0:
        return box
    shrink = 1 - jitter * draw.random()
    sides = []
    for axis in range(2):
        start, end = box[axis], box[axis + 2]
        side = (end - start) * shrink
        move = (2 * draw.random() - 1) * jitter * (end - start)
        start = min(max((start + end - side) / 2 + move, 0.0), size[axis] - side)
        sides.append((start, start + side))
    (left, right), (top, bottom) = sides
    return left, top, right, bottom


def top_left(size: tuple[int, int], variant: Variant) -> tuple[int, int]:
    """SDXL's crop condition: (top, left) of the crop in pixels of the scaled and mirrored photo.

    Podell et al. 2023 (arXiv 2307.01952), section 2.2.
    """
    left, top, right, _ = variant.box
    scale = variant.bucket.width / (right - left)
    from_left = size[0] - right if variant.flip else left
    return max(0, round(top * scale)), max(0, round(from_left * scale))


def render(pixels: Pixels, variant: Variant) -> Pixels:
    """Crop, resize (Lanczos), mirror and colour a photo: uint8 `[bucket height, bucket width, 3]`."""
    image = _crop(
        Image.fromarray(pixels), variant, (variant.bucket.width, variant.bucket.height), Image.Resampling.LANCZOS
    )
    enhancers = (
        (ImageEnhance.Brightness, variant.brightness),
        (ImageEnhance.Contrast, variant.contrast),
        (ImageEnhance.Color, variant.saturation),
    )
    for enhancer, factor in enhancers:
        if factor != 1:
            image = enhancer(image).enhance(factor)
    return np.array(image)


def render_mask(mask: Pixels, variant: Variant, downscale: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The mask at latent size, `[bucket height / downscale, bucket width / downscale]`, 0 to 1, by area averages."""
    size = (variant.bucket.width // downscale, variant.bucket.height // downscale)
    values = np.asarray(_crop(Image.fromarray(mask), variant, size, Image.Resampling.BOX))
    return values.astype(np.float32) / np.float32(255)


def _crop(image: Image.Image, variant: Variant, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    image = image.resize(size, resampling, box=variant.box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if variant.flip else image
