"""Kernels for quantized weights: NF4 dequantization and int8 products.

NF4 is dequantized by a Triton kernel where the GPU supports it, else by bitsandbytes if installed, else by plain torch.
The first two multiply in float32 and round once, and move 2.7 bytes for each weight in half precision. Plain torch
rounds twice, so a last bit may differ, and moves 10.5 bytes.

int8 products (W8A8) also quantize the other factor, each row by its largest magnitude, and accumulate in int32.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lorakit.core.errors import LorakitError
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
# Takes the codes, two in a byte, and the scale of each block; returns the values `[numel]` in the dtype of the scales.
Dequantize = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def dequantize(codes: torch.Tensor, scales: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Dequantize a weight of this shape: codes uint8 `[numel / 2]`, the first of two in the high half; scales `[numel /
    64, 1]`."""
    return _quickest(scales.dtype, codes.device)(codes, scales).view(shape)


def _quickest(dtype: torch.dtype, device: torch.device) -> Dequantize:
    """The dequantization kernel for this device."""
    return _choose(dtype, device, kernels.uses_triton(device))


@functools.lru_cache
def _choose(dtype: torch.dtype, device: torch.device, triton: bool) -> Dequantize:
    def sample() -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.arange(4 * 256, device=device).to(torch.uint8)
        return codes, torch.linspace(0.01, 4, len(codes) * 2 // BLOCK_SIZE, device=device).to(dtype)[:, None]

    compiled = [by_bitsandbytes] if device.type in ("cuda", "cpu") and _has_kernels_for(device) else []
    return kernels.choose([*([by_triton] if triton else []), *compiled], by_torch, sample)


def _has_kernels_for(device: torch.device) -> bool:
    """Whether bitsandbytes is installed, can be imported, and brings compiled kernels for the device."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    logger = logging.getLogger("bitsandbytes")  # on a CPU it warns about a product that is not used here
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from bitsandbytes.cextension import lib

        return device.type == "cpu" or bool(lib.compiled_with_cuda)
    except Exception:  # the library does not fit this system
        return False
    finally:
        logger.setLevel(level)


def by_torch(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
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
    """The two values of every byte, `[256, 2]`: one lookup per byte instead of two."""
    levels = torch.tensor(NF4, dtype=dtype, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1)


# torch's int8 product on CUDA needs more rows than this, and sides that are multiples of `INT8_MULTIPLE`.
INT8_MIN_ROWS, INT8_MULTIPLE = 16, 8


def int8_fits(rows: int, shape: Sequence[int]) -> bool:
    """Whether a product of `rows` rows with a weight of this shape can be computed in int8."""
    return rows > INT8_MIN_ROWS and all(side % INT8_MULTIPLE == 0 for side in shape)


def require_int8(device: torch.device) -> None:
    """Raise LorakitError if the device cannot multiply in int8, or its result is wrong."""
    x = torch.arange(32 * 16, device=device).remainder(251).sub(125).to(torch.int8).view(32, 16)
    weight = torch.arange(24 * 16, device=device).remainder(241).sub(120).to(torch.int8).view(24, 16)
    try:
        result = torch._int_mm(x, weight.t())
        if torch.equal(result.cpu(), x.cpu().int() @ weight.cpu().int().t()):
            return
        reason = "the result is wrong"
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
    raise LorakitError(
        "memory.base_storage = 'w8a8': products in int8 do not work on {device} with torch {version} "
        "({reason}): set 'int8', which is as small",
        device,
        torch.__version__,
        reason,
    )


def int8_product(x: torch.Tensor, qdata: torch.Tensor, scales: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """x W^T (`transposed`) or x W, in x's dtype; W is `qdata * scales`, int8 `[out, in]` and `[out, 1]`."""
    by_kernel = kernels.uses_triton(x.device) and not torch.compiler.is_compiling()
    function = _choose_product(x.dtype, x.device) if by_kernel else torch_int8_product
    return function(x, qdata, scales, transposed)


def torch_int8_product(x: torch.Tensor, qdata: torch.Tensor, scales: torch.Tensor, transposed: bool) -> torch.Tensor:
    """`int8_product` in plain torch."""
    # Scales of the summed axis cannot be applied after the sum, so they are multiplied into x.
    values = x.float() if transposed else x.float() * scales.float().t()
    largest = values.abs().amax(1, keepdim=True) / 127
    row_scales = torch.where(largest == 0, torch.ones_like(largest), largest)
    codes = (values / row_scales).add_(0.5).floor_().to(torch.int8)
    total = torch._int_mm(codes, _columns_first(qdata, transposed)) * row_scales
    return (total * scales.float().t() if transposed else total).to(x.dtype)


def triton_int8_product(x: torch.Tensor, qdata: torch.Tensor, scales: torch.Tensor, transposed: bool) -> torch.Tensor:
    """`int8_product` with Triton kernels before and after the product."""
    from lorakit.engine import triton_kernels

    factors = scales.view(-1)
    codes, row_scales = triton_kernels.quantize_rows(x, None if transposed else factors)
    total = torch._int_mm(codes, _columns_first(qdata, transposed))
    return triton_kernels.scale_product(total, row_scales, factors if transposed else None, x.dtype)


def _columns_first(qdata: torch.Tensor, transposed: bool) -> torch.Tensor:
    """W^T or W as the second factor in column-major order, which cuBLAS needs in int8."""
    return qdata.t() if transposed else qdata.t().contiguous().t()


@functools.lru_cache
def _choose_product(dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    def sample() -> tuple[object, ...]:
        codes = torch.arange(24 * 40, device=device).remainder(255).sub(127).to(torch.int8).view(24, 40)
        x = torch.linspace(-3, 3, 32 * 24, device=device).to(dtype).view(32, 24)
        return x, codes, torch.linspace(0.1, 0.2, 24, device=device).to(dtype)[:, None], False

    return kernels.choose([triton_int8_product], torch_int8_product, sample)
