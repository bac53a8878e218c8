"""Choose the training size of a photo: the aspect ratio that crops least of it. No photo is dropped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from lorakit.config import DataConfig

# Limits of a bucket: its area is within this factor of resolution^2, and its sides are within the second factor of the
# resolution, or within the root of `data.max_aspect` if that is larger.
MAX_AREA_FACTOR = 1.25
MAX_SIDE_FACTOR = 2.0
# Cost of one unit of log(area), as a share of the photo: a bucket with 1.25 times the area must save 5.6 % of the
# photo.
AREA_WEIGHT = 0.25


class Bucket(NamedTuple):
    """Width and height in pixels of photos in training."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Placement:
    """The bucket of a photo, and the crop `box` that is resized to the bucket's size.

    Attributes:
        bucket: the photo's size in training.
        box: (left, top, right, bottom) in pixels of the upright photo; fractions are exact.
        scale: bucket pixels for one photo pixel; above 1 the photo is scaled up.
        cropped: share of the photo's area that the crop removes, 0 to 1.
    """

    bucket: Bucket
    box: tuple[float, float, float, float]
    scale: float
    cropped: float

    @property
    def is_enlarged(self) -> bool:
        """Whether the photo is smaller than its bucket."""
        return self.scale > 1


@cache
def sizes(resolution: int, multiple: int, max_aspect: float = DataConfig.max_aspect) -> tuple[Bucket, ...]:
    """Every bucket of a resolution. Sides are multiples of `multiple`; the area is within `MAX_AREA_FACTOR` of
    resolution^2; the longer side is at most `max_aspect` times the shorter.

    If the resolution is not such a multiple, the nearest square is included.
    """
    area, factor = resolution**2, max(MAX_SIDE_FACTOR, math.sqrt(max_aspect))
    sides = range(multiple, int(factor * resolution) + 1, multiple)
    candidates = [
        Bucket(width, height)
        for width in sides
        for height in sides
        if area / MAX_AREA_FACTOR <= width * height <= area * MAX_AREA_FACTOR
        and min(width, height) * factor >= resolution
        and max(width, height) <= max_aspect * min(width, height)
    ]
    square = max(multiple, round(resolution / multiple) * multiple)
    return tuple(sorted({*candidates, Bucket(square, square)}))


def placements(size: tuple[int, int], data: DataConfig, multiple: int, relative: str) -> tuple[Placement, ...]:
    """`assign` for each resolution of the photo with this path in the folder."""
    return tuple(assign(size, side, multiple, data.max_aspect) for side in data.resolutions_of(relative))


def assign(
    size: tuple[int, int], resolution: int, multiple: int, max_aspect: float = DataConfig.max_aspect
) -> Placement:
    """The bucket of a photo of `size` (width, height), and the centred crop that fills it.

    Args:
        multiple: every side of a bucket is a multiple of it; see `BaseInfo.bucket_multiple`.
    """
    width, height = size

    def cost(bucket: Bucket) -> tuple[float, Bucket]:
        area = abs(math.log(bucket.width * bucket.height / resolution**2))
        return _crop_share(width / height, bucket) + AREA_WEIGHT * area, bucket

    bucket = min(sizes(resolution, multiple, max_aspect), key=cost)
    scale = max(bucket.width / width, bucket.height / height)
    crop_width, crop_height = min(width, bucket.width / scale), min(height, bucket.height / scale)
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    box = (left, top, left + crop_width, top + crop_height)
    return Placement(bucket, box, scale, _crop_share(width / height, bucket))


def _crop_share(aspect: float, bucket: Bucket) -> float:
    """Share of a photo with this aspect (width / height) that the bucket's aspect crops."""
    ratio = aspect * bucket.height / bucket.width
    return 1 - min(ratio, 1 / ratio)


def sharpness(image: Image.Image, placement: Placement) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al. 2000) divided by the variance of the picture, at the trained size.

    A photo that is smaller than its bucket is measured at its own size. `image` may be decoded at half or a quarter of
    the photo's size. A flat picture has no edges; its result is 1.
    """
    size = (placement.bucket.width, placement.bucket.height)
    if placement.is_enlarged:
        size = (max(3, round(size[0] / placement.scale)), max(3, round(size[1] / placement.scale)))
    left, top, right, bottom = placement.box
    factor = image.width / (left + right)  # the crop is centred
    box = (left * factor, top * factor, min(right * factor, image.width), min(bottom * factor, image.height))
    grey = np.asarray(
        image.convert("L").resize(size, Image.Resampling.BOX, box=box, reducing_gap=2.0), dtype=np.float32
    )
    inner = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1]
    laplacian += grey[1:-1, :-2]
    laplacian += grey[1:-1, 2:]
    laplacian -= 4 * inner
    spread = float(grey.var())
    # Rounding to 8 bits adds noise of variance 1/12 to each of the five pixels; the middle one counts 16-fold.
    return max(0.0, float(laplacian.var()) - 20 / 12) / spread if spread > 4 else 1.0
