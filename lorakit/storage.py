"""How a base's frozen weights can be kept, and what that takes: the arithmetic, without torch.

`lorakit.quantized` does it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# Weights that share a scale in NF4.
BLOCK = 64
# Layers of a UNet that keep their weights in full whatever its storage is: the first and the last, and what embeds the
# timestep and SDXL's sizes, whose error every block would hear. They are less than a hundredth of the weights.
IN_FULL = ("conv_in", "conv_out", "time_embedding", "add_embedding")


def stays_in_full(path: str, size: int) -> bool:
    """Whether the layer at a path inside the UNet, with so many weights, keeps them in full: it is one of those, or its
    weights are not whole blocks (a few thousand values in the smallest models)."""
    return size % BLOCK != 0 or not set(IN_FULL).isdisjoint(path.split("."))


def size_of(path: str, shape: Sequence[int], kind: str, width: int) -> int:
    """Bytes of a layer's weight in the storage `kind`; `width` is the bytes of one weight in full."""
    size = math.prod(shape)
    if kind == "full" or stays_in_full(path, size):
        return size * width
    return size + shape[0] * width if kind == "int8" else size // 2 + size // BLOCK * width
