"""Kernels in Triton, which is optional; each has a twin in plain torch. `TRITON_INTERPRET=1` runs them on a CPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def dequantize_nf4(codes: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, block_size: int) -> torch.Tensor:
    """The twin of `quantized_kernels.by_torch`; `levels` are the 16 values, float32."""
    result = torch.empty(2 * codes.numel(), dtype=scales.dtype, device=codes.device)
    grid = (triton.cdiv(codes.numel(), 1024),)
    _dequantize_nf4[grid](codes, scales, levels, result, codes.numel(), block_size // 2, WIDTH=1024)
    return result


def geglu(x: torch.Tensor) -> torch.Tensor:
    """The twin of `recompute.torch_geglu`."""
    x = x.contiguous()
    result = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _geglu[(triton.cdiv(result.numel(), 1024),)](x, result, result.numel(), result.shape[-1], WIDTH=1024)
    return result


def geglu_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The twin of `recompute.torch_geglu_backward`."""
    x, gradient = x.contiguous(), gradient.contiguous()
    result = torch.empty_like(x)
    grid = (triton.cdiv(gradient.numel(), 1024),)
    _geglu_backward[grid](gradient, x, result, gradient.numel(), gradient.shape[-1], WIDTH=1024)
    return result


def norm(x: torch.Tensor, module: torch.nn.GroupNorm, silu: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The twin of `recompute.torch_norm` for x `[B, C, h, w]` that is channels last."""
    (batch, channels, *_), groups, result = x.shape, module.num_groups, torch.empty_like(x)
    grid, sizes = _places(x)
    means, squares = x.new_empty(2, *grid, channels, dtype=torch.float32)
    _moments[grid](x, means, squares, **sizes)
    per_group = (batch, grid[1], groups, channels // groups)
    variance, mean = torch.var_mean(means.view(per_group), (1, 3), correction=0)
    variance.add_(squares.view(per_group).sum((1, 3)), alpha=groups / x[0].numel())
    rstd = variance.add_(module.eps).rsqrt_()
    _apply_norm[grid](x, mean, rstd, module.weight, module.bias, result, groups=groups, SILU=silu, **sizes)
    return result, mean, rstd


def norm_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    module: torch.nn.GroupNorm,
    silu: bool,
) -> torch.Tensor:
    """The twin of `recompute.torch_norm_backward` for x that is channels last."""
    gradient, result = gradient.contiguous(memory_format=torch.channels_last), torch.empty_like(x)
    (batch, channels, *_), groups = x.shape, module.num_groups
    grid, sizes = _places(x)
    parts = x.new_empty(2, *grid, channels, dtype=torch.float32)
    arguments = gradient, x, mean, rstd, module.weight, module.bias
    more = {"groups": groups, "SILU": silu, **sizes}
    _norm_sums[grid](*arguments, parts[0], parts[1], **more)
    means = parts.view(2, batch, grid[1], groups, -1).sum((2, 4)).mul_(groups / x[0].numel())
    _norm_gradient[grid](*arguments, means[0], means[1], result, **more)
    return result


def _places(x: torch.Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """A program for each picture and some of its places, and what it must know of their number."""
    batch, channels, height, width = x.shape
    rows = next(rows for rows in (16, 8, 4, 2, 1) if height * width % rows == 0)
    return (batch, height * width // rows), {
        "channels": channels,
        "rows": rows,
        "WIDTH": triton.next_power_of_2(channels),
    }


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
    x: tl.tensor,
    factors: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    columns: int,
    HAS_FACTORS: tl.constexpr,
    WIDTH: tl.constexpr,
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
    total: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    result: tl.tensor,
    size: int,
    width: int,
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
def _geglu(x: tl.tensor, result: tl.tensor, size: int, columns: int, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    # The value's place in rows of value and gate; the gate is `columns` further.
    place = at + at // columns * columns
    value = tl.load(x + place, mask=at < size, other=0).to(tl.float32)
    gate = tl.load(x + place + columns, mask=at < size, other=0).to(tl.float32)
    gelu = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    tl.store(result + at, (value * gelu).to(result.dtype.element_ty), mask=at < size)


@triton.jit  # type: ignore[untyped-decorator]
def _geglu_backward(gradient: tl.tensor, x: tl.tensor, result: tl.tensor, size: int, columns: int, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
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
def _dequantize_nf4(  # type: ignore[no-untyped-def]
    codes: tl.tensor,
    scales: tl.tensor,
    levels: tl.tensor,
    result: tl.tensor,
    size: int,
    per_scale: int,
    WIDTH: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    byte = tl.load(codes + at, mask=at < size, other=0).to(tl.int32)
    scale = tl.load(scales + at // per_scale, mask=at < size, other=0).to(tl.float32)
    first, second = tl.load(levels + (byte >> 4)) * scale, tl.load(levels + (byte & 15)) * scale
    to = tl.program_id(0).to(tl.int64) * 2 * WIDTH + tl.arange(0, 2 * WIDTH)
    tl.store(result + to, tl.interleave(first, second).to(result.dtype.element_ty), mask=to < 2 * size)


@triton.jit  # type: ignore[untyped-decorator]
def _moments(x: tl.tensor, means: tl.tensor, squares: tl.tensor, channels: int, rows: int, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean, and mean square of the differences from it times their number, of each channel over a program's places."""
    program, column = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1), tl.arange(0, WIDTH)
    start = x + program * rows * channels + column
    first = tl.load(start, mask=column < channels, other=0).to(tl.float32)
    total, square = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    for row in range(1, rows):
        difference = tl.load(start + row * channels, mask=column < channels, other=0).to(tl.float32) - first
        total += difference
        square += difference * difference
    to = program * channels + column
    tl.store(means + to, first + total / rows, mask=column < channels)
    tl.store(squares + to, square - total * total / rows, mask=column < channels)


@triton.jit  # type: ignore[untyped-decorator]
def _apply_norm(  # type: ignore[no-untyped-def]
    x: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    result: tl.tensor,
    channels: int,
    groups: int,
    rows: int,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
):
    batch, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside, group = column < channels, batch * groups + column // (channels // groups)
    center, width = tl.load(mean + group, mask=inside, other=0), tl.load(rstd + group, mask=inside, other=0)
    factor = width * tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    start = (batch * tl.num_programs(1) + tl.program_id(1)) * rows * channels + column
    for row in range(0, rows):
        at = start + row * channels
        y = (tl.load(x + at, mask=inside, other=0).to(tl.float32) - center) * factor + shift
        if SILU:
            y = y * tl.sigmoid(y)
        tl.store(result + at, y.to(result.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _norm_sums(  # type: ignore[no-untyped-def]
    gradient: tl.tensor,
    x: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    sums: tl.tensor,
    products: tl.tensor,
    channels: int,
    groups: int,
    rows: int,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of each channel over a program's places: the sum of the gradients of the normed values, and of their products
    with these."""
    batch, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside, group = column < channels, batch * groups + column // (channels // groups)
    center, width = tl.load(mean + group, mask=inside, other=0), tl.load(rstd + group, mask=inside, other=0)
    factor = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    program = batch * tl.num_programs(1) + tl.program_id(1)
    total, product = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    for row in range(0, rows):
        at = program * rows * channels + row * channels + column
        normed = (tl.load(x + at, mask=inside, other=0).to(tl.float32) - center) * width
        towards = tl.load(gradient + at, mask=inside, other=0).to(tl.float32) * factor
        if SILU:
            y = normed * factor + shift
            share = tl.sigmoid(y)
            towards = towards * share * (1 + y * (1 - share))
        total += towards
        product += towards * normed
    tl.store(sums + program * channels + column, total, mask=inside)
    tl.store(products + program * channels + column, product, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _norm_gradient(  # type: ignore[no-untyped-def]
    gradient: tl.tensor,
    x: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    sums: tl.tensor,
    products: tl.tensor,
    result: tl.tensor,
    channels: int,
    groups: int,
    rows: int,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
):
    batch, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside, group = column < channels, batch * groups + column // (channels // groups)
    center, width = tl.load(mean + group, mask=inside, other=0), tl.load(rstd + group, mask=inside, other=0)
    factor = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    total, product = tl.load(sums + group, mask=inside, other=0), tl.load(products + group, mask=inside, other=0)
    for row in range(0, rows):
        at = ((batch * tl.num_programs(1) + tl.program_id(1)) * rows + row) * channels + column
        normed = (tl.load(x + at, mask=inside, other=0).to(tl.float32) - center) * width
        towards = tl.load(gradient + at, mask=inside, other=0).to(tl.float32) * factor
        if SILU:
            y = normed * factor + shift
            share = tl.sigmoid(y)
            towards = towards * share * (1 + y * (1 - share))
        to = width * (towards - total - normed * product)
        tl.store(result + at, to.to(result.dtype.element_ty), mask=inside)
