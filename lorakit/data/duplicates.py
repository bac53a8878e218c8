"""Photos that look almost the same, among tens of thousands."""

from __future__ import annotations

from typing import Any

import numpy as np

# Two photos look the same within this many bits of a 256-bit difference hash and this mean colour difference (of 255)
# of 16 x 16 thumbnails. Copies saved at quality 50 or cropped by 1 % had up to 23 bits and 3.5. Four drawings of one
# figure in other poses on white had 13 bits, and colours that differ by 5 or more. Flat pictures all have similar
# hashes; only their colours differ.
MAX_HASH_DISTANCE, MAX_COLOUR_DISTANCE = 24, 4.0
# Thumbnails that are compared at once; the first that matches ends the search.
CHUNK = 32

Hashes = np.ndarray[Any, np.dtype[np.bool_]]
Colours = np.ndarray[Any, np.dtype[np.float32]]


def first_matches(hashes: Hashes, colours: Colours) -> dict[int, int]:
    """Number of a photo -> the first photo before it that looks the same.

    Two thumbnails differ on average by at least the difference of their averages, so only photos of about the same
    brightness are compared: sorted by it, they lie side by side.

    Args:
        hashes: `[n, 256]`.
        colours: `[n, 16, 16, 3]`.
    """
    count = len(hashes)
    if not count:
        return {}
    packed = np.packbits(hashes, axis=1).view(np.uint64)
    pixels = colours.reshape(count, -1)
    brightness = pixels.mean(axis=1, dtype=np.float64)
    order = np.argsort(brightness, kind="stable")
    margin = MAX_COLOUR_DISTANCE + 0.001
    low = np.searchsorted(brightness[order], brightness - margin, "left").tolist()
    high = np.searchsorted(brightness[order], brightness + margin, "right").tolist()
    # The rows of a window lie side by side in memory.
    ordered = np.ascontiguousarray(packed[order])
    matches = {}
    for at in range(count):
        window = slice(low[at], high[at])
        near = np.bitwise_count(ordered[window] ^ packed[at]).sum(axis=1, dtype=np.int16) <= MAX_HASH_DISTANCE
        candidates = np.sort(order[window][near])
        candidates = candidates[: np.searchsorted(candidates, at)]
        for start in range(0, len(candidates), CHUNK):
            chunk = candidates[start : start + CHUNK]
            equal = np.abs(pixels[chunk] - pixels[at]).mean(axis=1) <= MAX_COLOUR_DISTANCE
            if equal.any():
                matches[at] = int(chunk[equal.argmax()])
                break
    return matches


def some_lines(lines: list[str], limit: int = 5) -> list[str]:
    """The first `limit` lines; where there are more, the last says how many, so that they bury nothing else."""
    if len(lines) <= limit + 1:
        return lines
    cause = lines[-1].partition(": ")[2]
    return [*lines[:limit], f"{len(lines) - limit} more lines like the last are in lorakit check --json: {cause}"]
