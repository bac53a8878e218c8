"""Tests of flip and jitter: they depend on seed, photo and number alone, and the size conditions match them."""

import marked
import numpy as np
import pytest

from lorakit.config import DataConfig
from lorakit.data import augment, buckets
from lorakit.data.augment import Variant
from lorakit.data.buckets import Bucket

ALL = DataConfig(flip=True, crop_jitter=0.2, color_jitter=0.3, variants=8)


def of(config: DataConfig, size: tuple[int, int] = (96, 64), seed: int = 0, name: str = "a.jpg") -> list[Variant]:
    return augment.of_photo(size, buckets.assign(size, 64, 16), config, seed, name)


def test_variants_follow_from_seed_photo_and_number() -> None:
    assert of(ALL) == of(ALL)
    assert of(ALL)[1:] != of(ALL, seed=1)[1:]
    assert of(ALL)[1:] != of(ALL, name="b.jpg")[1:]
    assert len(set(of(ALL))) == 8


def test_the_first_variant_is_the_plain_photo() -> None:
    placement = buckets.assign((96, 64), 64, 16)
    assert of(ALL)[0] == of(DataConfig())[0] == Variant(placement.bucket, placement.box)


def test_variants_with_flip_have_both_sides() -> None:
    assert [variant.flip for variant in of(ALL)] == [False, True] * 4
    assert [variant.flip for variant in of(DataConfig(flip=True, variants=2))] == [False, True]
    assert not any(variant.flip for variant in of(DataConfig(crop_jitter=0.1, variants=4)))


@pytest.mark.parametrize("size", [(96, 64), (64, 64), (2000, 300), (40, 41)])
def test_a_jittered_crop_stays_in_the_photo_and_keeps_its_shape(size: tuple[int, int]) -> None:
    config = DataConfig(crop_jitter=0.25, variants=64)
    variants = of(config, size)
    plain = variants[0]
    full = plain.box[2] - plain.box[0]
    assert len({variant.box for variant in variants}) == 64
    for variant in variants:
        left, top, right, bottom = variant.box
        assert left >= 0
        assert top >= 0
        assert right <= size[0] + 1e-9
        assert bottom <= size[1] + 1e-9
        assert 0.75 * full <= right - left <= full + 1e-9
        assert (right - left) / (bottom - top) == pytest.approx(plain.bucket.width / plain.bucket.height)


def test_colours_stay_within_the_strength() -> None:
    for variant in of(DataConfig(color_jitter=0.3, variants=64))[1:]:
        for factor in (variant.brightness, variant.contrast, variant.saturation):
            assert 0.7 <= factor <= 1.3


def test_render_crops_mirrors_and_changes_colours() -> None:
    pixels = marked.picture(21, 128, 128)
    bucket = Bucket(64, 64)
    plain = augment.render(pixels, Variant(bucket, (0, 0, 128, 128)))
    assert plain.shape == (64, 64, 3)
    assert plain.dtype == np.uint8
    assert marked.marked_corner(plain) == "upper left"
    assert marked.number_of(plain) == 21
    flipped = augment.render(pixels, Variant(bucket, (0, 0, 128, 128), flip=True))
    assert np.array_equal(flipped, plain[:, ::-1])
    bright = augment.render(pixels, Variant(bucket, (0, 0, 128, 128), brightness=1.25))
    assert bright[32, 32].tolist() == [int(value * 1.25) for value in plain[32, 32]]
    grey = augment.render(pixels, Variant(bucket, (0, 0, 128, 128), saturation=0.0))
    assert len(set(grey[32, 32].tolist())) == 1
    flat = augment.render(pixels, Variant(bucket, (0, 0, 128, 128), contrast=0.0))
    assert flat.min() == flat.max()
    right_half = augment.render(pixels, Variant(bucket, (64, 64, 128, 128)))
    assert np.array_equal(right_half, pixels[64:, 64:])


def test_masks_are_cropped_like_their_photo_and_averaged() -> None:
    mask = np.zeros((64, 128), np.uint8)
    mask[:, :32] = 255
    mask[:, 32:36] = 255
    cut = augment.render_mask(mask, Variant(Bucket(64, 64), (0, 0, 64, 64)), 8)
    assert cut.shape == (8, 8)
    assert cut.dtype == np.float32
    assert cut[0].tolist() == [1, 1, 1, 1, np.float32(128 / 255), 0, 0, 0]
    flipped = augment.render_mask(mask, Variant(Bucket(64, 64), (0, 0, 64, 64), flip=True), 8)
    assert np.array_equal(flipped, cut[:, ::-1])


@pytest.mark.parametrize(
    ("size", "variant", "expected"),
    [
        # 2000 x 1000 scaled by 1024 / 1000 is 2048 x 1024; the middle crop begins at 512, mirrored or not.
        ((2000, 1000), Variant(Bucket(1024, 1024), (500, 0, 1500, 1000)), (0, 512)),
        ((2000, 1000), Variant(Bucket(1024, 1024), (500, 0, 1500, 1000), flip=True), (0, 512)),
        # The crop begins 100 from the left of the photo; after mirroring it begins 900 from the left.
        ((2000, 1000), Variant(Bucket(1024, 1024), (100, 0, 1100, 1000)), (0, 102)),
        ((2000, 1000), Variant(Bucket(1024, 1024), (100, 0, 1100, 1000), flip=True), (0, 922)),
        ((1000, 2000), Variant(Bucket(512, 512), (0, 250, 1000, 1250)), (128, 0)),
    ],
)
def test_crop_conditions_follow_the_crop(size: tuple[int, int], variant: Variant, expected: tuple[int, int]) -> None:
    assert augment.top_left(size, variant) == expected


def test_a_flip_has_the_crop_condition_of_a_mirrored_file() -> None:
    """A mirrored file with the mirrored crop gives the same pixels and the same condition as a flip."""
    pixels = np.random.default_rng(0).integers(0, 256, (100, 200, 3), dtype=np.uint8)
    bucket = Bucket(64, 64)
    flipped = Variant(bucket, (30, 10, 110, 90), flip=True)
    by_hand = Variant(bucket, (200 - 110, 10, 200 - 30, 90))
    assert augment.top_left((200, 100), flipped) == augment.top_left((200, 100), by_hand)
    mirrored = augment.render(np.ascontiguousarray(pixels[:, ::-1]), by_hand).astype(int)
    assert np.abs(augment.render(pixels, flipped) - mirrored).max() <= 1  # Lanczos may round differently by 1
