"""Sizes of quantized and offloaded weights, computed without torch.

`lorakit.engine.quantized_weight` quantizes; `lorakit.engine.weight_offload` keeps weights in host memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# Weights that share a scale in NF4.
BLOCK_SIZE = 64
# Schemes with one byte for each weight and one scale for each output channel.
EIGHT_BITS = ("int8", "w8a8")
# These layers of a UNet (first, last, embeddings of the timestep and of SDXL's sizes) are never quantized: their error
# would reach every block. They hold less than a hundredth of the weights.
UNQUANTIZED_LAYERS = ("conv_in", "conv_out", "time_embedding", "add_embedding")
# Bytes of offloaded weights on the device at once: the one in use and the prefetched ones. In half precision SDXL's
# largest weight has 59 MB, and its most frequent transformer block 66 MB.
WINDOW_BYTES = 2**27
# Bytes of a slab of host memory, a power of two because torch rounds pinned allocations up to one; and the alignment of
# each weight in it.
SLAB_BYTES, ALIGNMENT = 2**27, 64


def is_quantizable(path: str, size: int) -> bool:
    """Whether the layer at `path` in the UNet, with `size` weights, can be quantized or offloaded: it is not one of
    `UNQUANTIZED_LAYERS`, and its weights fill complete blocks."""
    return size % BLOCK_SIZE == 0 and set(UNQUANTIZED_LAYERS).isdisjoint(path.split("."))


def weight_nbytes(path: str, shape: Sequence[int], scheme: str, width: int) -> int:
    """Bytes of a layer's weight in a quantization scheme; `width` is the bytes of one unquantized value."""
    size = math.prod(shape)
    if scheme == "full" or not is_quantizable(path, size):
        return size * width
    return size + shape[0] * width if scheme in EIGHT_BITS else size // 2 + size // BLOCK_SIZE * width


def pack_into_slabs(sizes: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Assign weights of these sizes in bytes to slabs, each to the first slab with room.

    Returns:
        (slab, first byte) of each weight, and the length of each slab. A weight larger than a slab gets its own.
    """
    slots: list[tuple[int, int]] = []
    lengths: list[int] = []
    for size in sizes:
        padded = -(-size // ALIGNMENT) * ALIGNMENT
        slab = next((n for n, length in enumerate(lengths) if length + padded <= SLAB_BYTES), len(lengths))
        lengths += [0] * (slab == len(lengths))
        slots.append((slab, lengths[slab]))
        lengths[slab] += padded
    return slots, lengths
