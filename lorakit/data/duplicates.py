"""Find photos that look almost the same, among tens of thousands."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from lorakit.core.messages import OTHER_LINES, Message

# Two photos look the same if they differ by at most this many bits of a 256-bit difference hash, and by this mean
# colour difference (of 255) of 16 x 16 thumbnails. Copies saved at quality 50 or cropped by 1 % had up to 23 bits and
# 3.5. Four drawings of one figure in other poses on white had 13 bits, and colours that differ by 5 or more. Flat
# pictures all have similar hashes; only their colours differ.
MAX_HASH_DISTANCE, MAX_COLOUR_DISTANCE = 24, 4.0
# Number of thumbnails compared at once; the search ends at the first match.
CHUNK = 512
# A picture is first reduced by an integer factor to at least this side, which makes both thumbnails cheap.
SMALL_SIDE = 256

Hashes = np.ndarray[Any, np.dtype[np.bool_]]
Colours = np.ndarray[Any, np.dtype[np.float32]]


def fingerprint(image: Image.Image) -> tuple[Hashes, Colours]:
    """The difference hash of a picture, `[256]`, and its colours, `[16, 16, 3]`."""
    factor = max(1, min(image.size) // SMALL_SIDE)
    small, box = image.reduce(factor), (0, 0, image.width / factor, image.height / factor)
    grey = np.asarray(small.resize((17, 16), Image.Resampling.BOX, box=box).convert("L"), dtype=np.int16)
    colours = np.asarray(small.resize((16, 16), Image.Resampling.BOX, box=box), dtype=np.float32)
    return (grey[:, 1:] > grey[:, :-1]).ravel(), colours


def first_matches(hashes: Hashes, colours: Colours) -> dict[int, int]:
    """Index of a photo -> the first earlier photo that looks the same.

    The mean difference of two thumbnails is at least the difference of their means. So photos are sorted by brightness,
    and only those of similar brightness are compared: first their hashes, then the means of 4 x 4 parts, then all
    colours.

    Args:
        hashes: `[n, 256]`.
        colours: `[n, 16, 16, 3]`.
    """
    count = len(hashes)
    if not count:
        return {}
    pixels = colours.reshape(count, -1)
    parts = colours.reshape(count, 4, 4, 4, 4, 3).mean(axis=(2, 4)).reshape(count, -1)
    brightness = pixels.mean(axis=1, dtype=np.float64)
    order = np.argsort(brightness, kind="stable")
    margin = MAX_COLOUR_DISTANCE + 0.001
    low = np.searchsorted(brightness[order], brightness - margin, "left").tolist()
    high = np.searchsorted(brightness[order], brightness + margin, "right").tolist()
    # `[4, n]`: the words of a window are adjacent in memory.
    words = np.ascontiguousarray(np.packbits(hashes, axis=1).view(np.uint64)[order].T)
    places = np.argsort(order).tolist()
    matches = {}
    for at in range(count):
        window = slice(low[at], high[at])
        own = words[:, places[at], None]
        near = np.bitwise_count(words[:, window] ^ own).sum(axis=0, dtype=np.int16) <= MAX_HASH_DISTANCE
        candidates = np.sort(order[window][near])
        candidates = candidates[: np.searchsorted(candidates, at)]
        for start in range(0, len(candidates), CHUNK):
            chunk = candidates[start : start + CHUNK]
            chunk = chunk[np.abs(parts[chunk] - parts[at]).mean(axis=1) <= margin]
            equal = np.abs(pixels[chunk] - pixels[at]).mean(axis=1) <= MAX_COLOUR_DISTANCE
            if equal.any():
                matches[at] = int(chunk[equal.argmax()])
                break
    return matches


def some_lines(lines: list[str], limit: int = 5) -> list[str]:
    """The first `limit` lines, and a last line with the number of the others."""
    if len(lines) <= limit + 1:
        return lines
    last = lines[-1]
    cause = last.values["cause"] if isinstance(last, Message) and "cause" in last.values else last.partition(": ")[2]
    return [*lines[:limit], Message(OTHER_LINES, len(lines) - limit, cause)]
