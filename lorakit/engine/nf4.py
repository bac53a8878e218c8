"""NF4: the values of its codes, and the quickest function at hand that gives the values of a weight's codes.

That is bitsandbytes' kernel where it is installed, else a kernel of Triton on a card that has it, else plain torch. The
first two multiply in float32 and round once, and move 2.6 bytes for each weight in half precision; plain torch rounds
twice, so that a last bit may differ, and moves 10.5.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lorakit.engine import kernels
from lorakit.engine.weight_storage import BLOCK_SIZE

# The 16 values of NF4, quantiles of a normal distribution scaled into [-1, 1] with an exact zero (Dettmers et al. 2023,
# arXiv 2305.14314, appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# From the codes, two in a byte, and the scale of each block to the values `[numel]`, in the dtype of the scales.
Dequantize = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def dequantize(codes: torch.Tensor, scales: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The weight of this shape: codes uint8 `[numel / 2]`, the first of two in the high half; scales
    `[numel / 64, 1]`."""
    return _quickest(scales.dtype, codes.device)(codes, scales).view(shape)


def _quickest(dtype: torch.dtype, device: torch.device) -> Dequantize:
    """What dequantizes on this device."""
    return _choose(dtype, device, kernels.uses_triton(device))


@functools.lru_cache
def _choose(dtype: torch.dtype, device: torch.device, triton: bool) -> Dequantize:
    def sample() -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.arange(4 * 256, device=device).to(torch.uint8)
        return codes, torch.linspace(0.01, 4, len(codes) * 2 // BLOCK_SIZE, device=device).to(dtype)[:, None]

    compiled = [by_bitsandbytes] if device.type in ("cuda", "cpu") and _has_kernels_for(device) else []
    return kernels.choose([*compiled, *([by_triton] if triton else [])], plain, sample)


def _has_kernels_for(device: torch.device) -> bool:
    """Whether bitsandbytes is installed, can be imported, and brings compiled kernels for the device."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    logger = logging.getLogger("bitsandbytes")  # on a CPU it warns of a product that nothing here uses
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from bitsandbytes.cextension import lib

        return device.type == "cpu" or bool(lib.compiled_with_cuda)
    except Exception:  # a library that does not fit this system
        return False
    finally:
        logger.setLevel(level)


def plain(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`Dequantize` in plain torch."""
    pairs = _value_pairs(scales.dtype, codes.device).index_select(0, codes.int())
    return pairs.view(-1, BLOCK_SIZE).mul_(scales).view(-1)


def by_bitsandbytes(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`Dequantize` by bitsandbytes."""
    shape = (2 * codes.numel(),)
    function: Any = torch.ops.bitsandbytes.dequantize_4bit
    result: torch.Tensor = function(codes.view(-1, 1), scales.float().view(-1), BLOCK_SIZE, "nf4", shape, scales.dtype)
    return result.view(-1)


def by_triton(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`Dequantize` by Triton."""
    from lorakit.engine import triton_kernels

    return triton_kernels.dequantize_nf4(codes, scales, _levels(codes.device), BLOCK_SIZE)


@functools.lru_cache
def _levels(device: torch.device) -> torch.Tensor:
    return torch.tensor(NF4, device=device)


@functools.lru_cache
def _value_pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The two values of every byte, `[256, 2]`: one look-up a byte instead of two."""
    levels = torch.tensor(NF4, dtype=dtype, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1)
