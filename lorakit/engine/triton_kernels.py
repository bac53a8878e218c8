"""Kernels in Triton, which is optional; each has a twin in plain torch. `TRITON_INTERPRET=1` runs them on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


def dequantize_nf4(codes: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, block_size: int) -> torch.Tensor:
    """The twin of `nf4.plain`; `levels` are the 16 values, float32."""
    result = torch.empty(2 * codes.numel(), dtype=scales.dtype, device=codes.device)
    grid = (triton.cdiv(codes.numel(), 1024),)
    _dequantize_nf4[grid](codes, scales, levels, result, codes.numel(), block_size // 2, WIDTH=1024)
    return result


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize_nf4(codes: Any, scales: Any, levels: Any, result: Any, size: Any, per_scale: Any, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    byte = tl.load(codes + at, mask=at < size, other=0).to(tl.int32)
    scale = tl.load(scales + at // per_scale, mask=at < size, other=0).to(tl.float32)
    first, second = tl.load(levels + (byte >> 4)) * scale, tl.load(levels + (byte & 15)) * scale
    to = tl.program_id(0).to(tl.int64) * 2 * WIDTH + tl.arange(0, 2 * WIDTH)
    tl.store(result + to, tl.interleave(first, second).to(result.dtype.element_ty), mask=to < 2 * size)
