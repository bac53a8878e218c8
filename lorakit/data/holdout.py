"""Which photos are kept back for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from lorakit.data.folder import Photo

# With fewer photos, one kept back is missed more in training than its measurement is worth.
ENOUGH = 10


def split(photos: Sequence[Photo], share: float, seed: int) -> tuple[list[Photo], list[Photo]]:
    """Photos to train on and photos kept for validation, each in the given order.

    Where there are `ENOUGH` photos, `share` of them, at least one, are kept back; else none. Which ones follows from
    the seed and each photo's own name, so a photo more or less changes little.
    """
    if share == 0 or len(photos) < ENOUGH:
        return list(photos), []
    ranked = sorted(photos, key=lambda photo: hashlib.sha256(f"{seed}/{photo.relative}".encode()).digest())
    held = {photo.relative for photo in ranked[: max(1, round(share * len(photos)))]}
    return [p for p in photos if p.relative not in held], [p for p in photos if p.relative in held]


def said(count: int, held_out: int, share: float) -> str:
    """The split in a line for the person."""
    if held_out:
        return f"validation: {held_out} of {count} photos are kept back and never trained on"
    if share == 0:
        return "validation: no photo is kept back (train.holdout = 0); it looks at training photos"
    return f"validation: fewer than {ENOUGH} photos, none is kept back; it looks at training photos"
