"""Tests of the training size of each photo and of the part that is cropped."""

import math

import pytest

from lorakit.data import buckets
from lorakit.data.buckets import Bucket


@pytest.mark.parametrize(("resolution", "multiple"), [(64, 16), (64, 32), (512, 64), (768, 64), (1024, 64), (1024, 32)])
def test_every_size_keeps_the_area_and_the_multiple(resolution: int, multiple: int) -> None:
    sizes = buckets.sizes(resolution, multiple)
    assert Bucket(resolution, resolution) in sizes
    for width, height in sizes:
        assert width % multiple == height % multiple == 0
        assert 0.8 <= width * height / resolution**2 <= 1.25
        assert resolution / 2 <= min(width, height) <= max(width, height) <= 2 * resolution
    assert {(height, width) for width, height in sizes} == set(sizes)


@pytest.mark.parametrize("resolution", [64, 72, 512, 600, 1000])
@pytest.mark.parametrize("multiple", [8, 16, 64, 128])
def test_every_resolution_has_sizes(resolution: int, multiple: int) -> None:
    sizes = buckets.sizes(resolution, multiple)
    assert sizes
    assert all(width % multiple == height % multiple == 0 for width, height in sizes)


@pytest.mark.parametrize(
    ("size", "resolution", "multiple", "bucket"),
    [
        ((1280, 1280), 64, 16, (64, 64)),
        ((1000, 950), 64, 16, (64, 64)),
        ((4032, 3024), 512, 64, (576, 448)),
        ((3024, 4032), 512, 64, (448, 576)),
        ((1000, 1000), 512, 64, (512, 512)),
        ((1920, 1080), 512, 64, (704, 384)),
        ((3000, 2000), 1024, 64, (1280, 832)),
        ((300, 200), 1024, 64, (1280, 832)),
        ((10_000, 500), 512, 64, (1024, 256)),
    ],
)
def test_common_photos_get_the_expected_size(
    size: tuple[int, int], resolution: int, multiple: int, bucket: tuple[int, int]
) -> None:
    assert buckets.assign(size, resolution, multiple).bucket == bucket


def test_the_chosen_size_crops_nearly_the_least() -> None:
    """Compare with every size, for many shapes: the chosen size crops at most 10 % more of the photo than the best."""
    for at in range(60):
        aspect = 0.25 * 16 ** (at / 59)
        size = (round(1000 * math.sqrt(aspect)), round(1000 / math.sqrt(aspect)))
        placement = buckets.assign(size, 512, 64)
        least = min(
            1 - min(size[0] * b.height / (size[1] * b.width), size[1] * b.width / (size[0] * b.height))
            for b in buckets.sizes(512, 64)
        )
        assert placement.cropped - least <= 0.10
        assert placement.cropped <= 0.12


def test_the_crop_is_centred_inside_the_photo_and_of_the_buckets_shape() -> None:
    for size in [(1280, 1280), (4000, 3000), (333, 777), (64, 64), (1, 5000), (5000, 1), (17, 3)]:
        placement = buckets.assign(size, 64, 16)
        left, top, right, bottom = placement.box
        assert left >= 0
        assert top >= 0
        assert right <= size[0]
        assert bottom <= size[1]
        assert left + right == pytest.approx(size[0])
        assert top + bottom == pytest.approx(size[1])
        assert (right - left) / (bottom - top) == pytest.approx(placement.bucket.width / placement.bucket.height)
        assert placement.scale == pytest.approx(placement.bucket.width / (right - left))
        area = (right - left) * (bottom - top) / (size[0] * size[1])
        assert placement.cropped == pytest.approx(1 - area, abs=1e-9)
        assert placement.is_enlarged == (placement.scale > 1)


def test_square_photos_of_any_size_are_not_cropped() -> None:
    for side in (63, 64, 780, 781, 2048):
        placement = buckets.assign((side, side), 64, 16)
        assert placement.bucket == (64, 64)
        assert placement.cropped == 0
        assert placement.box == (0, 0, side, side)


def test_mixed_photos_share_few_sizes() -> None:
    sizes = [(1000 + 10 * n, 1000) for n in range(-30, 60)]
    assert len({buckets.assign(size, 64, 16).bucket for size in sizes}) <= 5
