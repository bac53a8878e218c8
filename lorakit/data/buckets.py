"""Which size a photo is trained at: the aspect ratio among a few that loses least of it. No photo is ever dropped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

# A bucket's area may be this factor away from resolution^2, and its sides this factor from resolution.
AREA = 1.25
SIDE = 2
# How much of a crop one unit of log(area) is worth: a bucket a quarter off in area must save 5.6 % of the photo.
AREA_COST = 0.25


class Bucket(NamedTuple):
    """A size in pixels that photos are trained at."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Placement:
    """How a photo goes into its bucket: `box` of it is cut out and resized to the bucket's size.

    Attributes:
        bucket: the size it is trained at.
        box: (left, top, right, bottom) in pixels of the upright photo; fractions are exact.
        scale: bucket pixels for one photo pixel; above 1 the photo is scaled up.
        cropped: share of the photo's area that is cut away, 0 to 1.
    """

    bucket: Bucket
    box: tuple[float, float, float, float]
    scale: float
    cropped: float

    @property
    def enlarged(self) -> bool:
        """Whether the photo has fewer pixels than its bucket asks for."""
        return self.scale > 1


@cache
def sizes(resolution: int, step: int) -> tuple[Bucket, ...]:
    """Every bucket for a resolution: sides are multiples of `step`, area within a factor `AREA` of resolution^2.

    A resolution that is no multiple of `step` has the nearest square among them.
    """
    area = resolution**2
    sides = range(step, SIDE * resolution + 1, step)
    found = [
        Bucket(width, height)
        for width in sides
        for height in sides
        if area / AREA <= width * height <= area * AREA and min(width, height) * SIDE >= resolution
    ]
    square = max(step, round(resolution / step) * step)
    return tuple(sorted({*found, Bucket(square, square)}))


def assign(size: tuple[int, int], resolution: int, step: int) -> Placement:
    """The bucket for a photo of `size` (width, height) and the centred box of it that fills the bucket.

    Args:
        step: every side is a multiple of it: pixels for one latent times 2^(the U-Net's downsamplers).
    """
    width, height = size

    def cost(bucket: Bucket) -> tuple[float, Bucket]:
        area = abs(math.log(bucket.width * bucket.height / resolution**2))
        return _cropped(width / height, bucket) + AREA_COST * area, bucket

    bucket = min(sizes(resolution, step), key=cost)
    scale = max(bucket.width / width, bucket.height / height)
    kept_width, kept_height = min(width, bucket.width / scale), min(height, bucket.height / scale)
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    box = (left, top, left + kept_width, top + kept_height)
    return Placement(bucket, box, scale, _cropped(width / height, bucket))


def _cropped(aspect: float, bucket: Bucket) -> float:
    """Share of a photo of this aspect (width / height) that does not fit the bucket's."""
    ratio = aspect * bucket.height / bucket.width
    return 1 - min(ratio, 1 / ratio)
