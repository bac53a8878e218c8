"""Decode the photos of a check, each once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from lorakit.config import DataConfig
from lorakit.data import buckets, decode, duplicates, masks
from lorakit.data.checks.report import Item

# The marker that `image_grid.save` writes before the pixels of a generated picture.
RECIPE, MAX_HEAD = b"iTXtlorakit\0", 1 << 16
OWN_PICTURE = "drawn by lorakit: a model learns nothing new from what a model drew"


@dataclass(frozen=True)
class Measurement:
    """The result of decoding a photo: its problem and notes, and the values for comparison with other photos."""

    problem: str = ""
    notes: tuple[str, ...] = ()
    hash: np.ndarray[Any, np.dtype[np.bool_]] = field(default_factory=lambda: np.zeros(0, np.bool_))
    colours: np.ndarray[Any, np.dtype[np.float32]] = field(default_factory=lambda: np.zeros(0, np.float32))
    grey: bool = False


# (name, files of the photo with time and size, edit, resolutions, aspect, multiple)
# -> (its `Item` without texts, its measurement).
MeasurementCache = dict[tuple[Any, ...], tuple[Item, Measurement]]


def measure(item: Item, config: DataConfig, multiple: int, cache: MeasurementCache | None) -> tuple[Item, Measurement]:
    """Decode one photo and fill the fields of its `Item`, or take them from the cache if photo and mask are
    unchanged."""
    if cache is None:
        return item, _measure(item, config, multiple)
    try:
        files = [(path, path.stat()) for path in (item.photo.path, item.photo.mask) if path is not None]
    except OSError:
        return item, _measure(item, config, multiple)
    stamps = [(path, status.st_mtime_ns, status.st_size) for path, status in files]
    key = (item.relative, *stamps, item.photo.edit, config.resolutions_of(item.relative), config.max_aspect, multiple)
    if key not in cache:
        measurement = _measure(item, config, multiple)
        cache[key] = replace(item), measurement
        return item, measurement
    measured, measurement = cache[key]
    return replace(measured, photo=item.photo, findings=[]), measurement


def _measure(item: Item, config: DataConfig, multiple: int) -> Measurement:
    """Decode one photo and fill the fields of its `Item`."""
    photo = item.photo
    try:
        raw = decode.read(photo.path, photo.relative)
        size = decode.measure(raw, photo.relative, photo.edit)
        with decode.one_at_a_time(size):
            return _measure_picture(item, raw, size, buckets.placements(size, config, multiple, item.relative))
    except decode.Unreadable as error:
        return Measurement(problem=error.reason if str(error).startswith(photo.relative) else str(error))


def _measure_picture(
    item: Item, raw: bytes, size: tuple[int, int], placements: Sequence[buckets.Placement]
) -> Measurement:
    placement, *lower = placements
    # Twice the trained size is enough to measure the sharpness.
    picture = decode.decode(raw, item.relative, at_least=2 * max(placement.bucket), edit=item.photo.edit)
    mask = masks.of_photo(item.photo, raw, size, picture.alpha)
    item.black_mask = mask is not None and not mask.any()
    item.digest = hashlib.sha256(raw).hexdigest() + str(item.photo.edit.geometry)
    item.width, item.height = size
    item.orientation, item.transparent = picture.orientation, picture.alpha is not None
    item.bucket, item.scale = placement.bucket, placement.scale
    item.lower_buckets = tuple(each.bucket for each in lower)
    item.cropped = max(each.cropped for each in placements)
    item.sharpness = buckets.sharpness(picture.image, placement)
    hash_bits, colours = duplicates.fingerprint(picture.image)
    sample = np.asarray(picture.image.resize((64, 64), Image.Resampling.NEAREST))
    has_no_colour = bool((sample.max(axis=2) - sample.min(axis=2) <= 8).all())
    notes = (*picture.notes, OWN_PICTURE) if RECIPE in raw[:MAX_HEAD] else picture.notes
    return Measurement("", notes, hash_bits, colours, has_no_colour)
