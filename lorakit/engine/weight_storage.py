"""How a base's frozen weights can be kept, and what that takes: the arithmetic, without torch.

`lorakit.engine.quantized_weight` does it, with `lorakit.engine.weight_offload` for those in the host's memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# Weights that share a scale in NF4.
BLOCK = 64
# Layers of a UNet that keep their weights in full whatever its storage is: the first and the last, and what embeds the
# timestep and SDXL's sizes, whose error every block would hear. They are less than a hundredth of the weights.
IN_FULL = ("conv_in", "conv_out", "time_embedding", "add_embedding")
# Bytes of streamed weights on the device: the one in use and those copied ahead of it. The largest of SDXL in half
# precision has 59 MB, the block of its transformers that there are most of 66.
WINDOW = 2**27
# Bytes of a slab of the host's memory: a power of two, to which torch rounds pinned memory; and of what a weight's
# place in it is a multiple.
SLAB, ALIGNED = 2**27, 64


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


def packed(sizes: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Weights of so many bytes in slabs, each in the first that has room for it.

    Returns:
        (slab, first byte) of each, and the length of each slab: a weight that is larger has one for itself.
    """
    places: list[tuple[int, int]] = []
    lengths: list[int] = []
    for size in sizes:
        taken = -(-size // ALIGNED) * ALIGNED
        slab = next((n for n, length in enumerate(lengths) if length + taken <= SLAB), len(lengths))
        lengths += [0] * (slab == len(lengths))
        places.append((slab, lengths[slab]))
        lengths[slab] += taken
    return places, lengths
