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


def geglu(x: torch.Tensor) -> torch.Tensor:
    """The twin of `recompute.plain_geglu`."""
    x = x.contiguous()
    result = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _geglu[(triton.cdiv(result.numel(), 1024),)](x, result, result.numel(), result.shape[-1], WIDTH=1024)
    return result


def geglu_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The twin of `recompute.plain_geglu_backward`."""
    x, gradient = x.contiguous(), gradient.contiguous()
    result = torch.empty_like(x)
    grid = (triton.cdiv(gradient.numel(), 1024),)
    _geglu_backward[grid](gradient, x, result, gradient.numel(), gradient.shape[-1], WIDTH=1024)
    return result


def quantize_rows(x: torch.Tensor, factors: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of a matrix whose columns are multiplied by `factors`, and the float32 scale of each row."""
    x = x.contiguous()
    rows, columns = x.shape
    codes, scales = torch.empty_like(x, dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)
    width = triton.next_power_of_2(columns)
    _quantize_rows[(rows,)](x, factors, codes, scales, columns, HAS_FACTORS=factors is not None, WIDTH=width)
    return codes, scales


def scale_product(
    total: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """An int32 matrix times a scale for each row and, if given, for each column, in `dtype`."""
    result = torch.empty_like(total, dtype=dtype)
    grid = (triton.cdiv(total.numel(), 1024),)
    has_columns = columns is not None
    _scale_product[grid](
        total, rows, columns, result, total.numel(), total.shape[1], HAS_COLUMNS=has_columns, WIDTH=1024
    )
    return result


@triton.jit  # type: ignore[untyped-decorator]
def _quantize_rows(  # type: ignore[no-untyped-def]
    x: Any, factors: Any, codes: Any, scales: Any, columns: Any, HAS_FACTORS: tl.constexpr, WIDTH: tl.constexpr
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    values = tl.load(x + row * columns + column, mask=column < columns, other=0).to(tl.float32)
    if HAS_FACTORS:
        values *= tl.load(factors + column, mask=column < columns, other=0).to(tl.float32)
    largest = tl.max(tl.abs(values), axis=0) / 127
    scale = tl.where(largest == 0, 1.0, largest)
    tl.store(scales + row, scale)
    tl.store(codes + row * columns + column, tl.floor(values / scale + 0.5).to(tl.int8), mask=column < columns)


@triton.jit  # type: ignore[untyped-decorator]
def _scale_product(  # type: ignore[no-untyped-def]
    total: Any,
    rows: Any,
    columns: Any,
    result: Any,
    size: Any,
    width: Any,
    HAS_COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    values = tl.load(total + at, mask=at < size, other=0).to(tl.float32)
    values *= tl.load(rows + at // width, mask=at < size, other=0)
    if HAS_COLUMNS:
        values *= tl.load(columns + at % width, mask=at < size, other=0).to(tl.float32)
    tl.store(result + at, values.to(result.dtype.element_ty), mask=at < size)


@triton.jit  # type: ignore[untyped-decorator]
def _geglu(x: Any, result: Any, size: Any, columns: Any, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    # The value's place in rows of value and gate; the gate is `columns` further.
    place = at + at // columns * columns
    value = tl.load(x + place, mask=at < size, other=0).to(tl.float32)
    gate = tl.load(x + place + columns, mask=at < size, other=0).to(tl.float32)
    gelu = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    tl.store(result + at, (value * gelu).to(result.dtype.element_ty), mask=at < size)


@triton.jit  # type: ignore[untyped-decorator]
def _geglu_backward(gradient: Any, x: Any, result: Any, size: Any, columns: Any, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    place = at + at // columns * columns
    value = tl.load(x + place, mask=at < size, other=0).to(tl.float32)
    gate = tl.load(x + place + columns, mask=at < size, other=0).to(tl.float32)
    towards = tl.load(gradient + at, mask=at < size, other=0).to(tl.float32)
    share = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(result + place, (towards * gate * share).to(result.dtype.element_ty), mask=at < size)
    tl.store(result + place + columns, (towards * value * slope).to(result.dtype.element_ty), mask=at < size)


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize_nf4(codes: Any, scales: Any, levels: Any, result: Any, size: Any, per_scale: Any, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    byte = tl.load(codes + at, mask=at < size, other=0).to(tl.int32)
    scale = tl.load(scales + at // per_scale, mask=at < size, other=0).to(tl.float32)
    first, second = tl.load(levels + (byte >> 4)) * scale, tl.load(levels + (byte & 15)) * scale
    to = tl.program_id(0).to(tl.int64) * 2 * WIDTH + tl.arange(0, 2 * WIDTH)
    tl.store(result + to, tl.interleave(first, second).to(result.dtype.element_ty), mask=to < 2 * size)
