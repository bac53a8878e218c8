"""Split the photos into training photos and validation photos."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from lorakit.core.messages import Message
from lorakit.data.photo_folder import Photo

# With fewer photos, a photo is worth more in training than in validation.
MIN_PHOTOS = 10


def split(photos: Sequence[Photo], share: float, seed: int) -> tuple[list[Photo], list[Photo]]:
    """Training photos and validation photos, each in the order of `photos`.

    With `MIN_PHOTOS` photos or more, `share` of them, at least one, are for validation; with fewer, none. The choice
    depends on the seed and each photo's name, so adding or removing a photo changes little.
    """
    if share == 0 or len(photos) < MIN_PHOTOS:
        return list(photos), []
    order = sorted(photos, key=lambda photo: hashlib.sha256(f"{seed}/{photo.relative}".encode()).digest())
    names = {photo.relative for photo in order[: max(1, round(share * len(photos)))]}
    return [p for p in photos if p.relative not in names], [p for p in photos if p.relative in names]


def describe_split(count: int, validation_count: int, share: float) -> str:
    """A message about how many of `count` photos are for validation."""
    if validation_count:
        return Message(
            "validation: {count} of {all} photos held out, never trained on",
            validation_count,
            count,
        )
    if share == 0:
        return "validation: no photo is held out (train.holdout = 0); it uses training photos"
    return Message("validation: fewer than {count} photos, none is held out; it uses training photos", MIN_PHOTOS)
