"""Optional Triton kernels; each has a reference in plain torch. `TRITON_INTERPRET=1` runs them on a CPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def dequantize_nf4(codes: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, block_size: int) -> torch.Tensor:
    """As `quantized_kernels.by_torch`; `levels` are the 16 values, float32."""
    result = torch.empty(2 * codes.numel(), dtype=scales.dtype, device=codes.device)
    grid = (triton.cdiv(codes.numel(), 1024),)
    _dequantize_nf4[grid](codes, scales, levels, result, codes.numel(), block_size // 2, WIDTH=1024)
    return result


def geglu(x: torch.Tensor) -> torch.Tensor:
    """As `recompute.torch_geglu`."""
    x = x.contiguous()
    result = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _geglu[(triton.cdiv(result.numel(), 1024),)](x, result, result.numel(), result.shape[-1], WIDTH=1024)
    return result


def geglu_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """As `recompute.torch_geglu_backward`."""
    x, gradient = x.contiguous(), gradient.contiguous()
    result = torch.empty_like(x)
    grid = (triton.cdiv(gradient.numel(), 1024),)
    _geglu_backward[grid](gradient, x, result, gradient.numel(), gradient.shape[-1], WIDTH=1024)
    return result


# Values that a program of the norm kernels holds at once, and programs per picture that keep a GPU busy.
TILE, PROGRAMS = 4096, 512


def norm(x: torch.Tensor, module: torch.nn.GroupNorm, silu: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `recompute.torch_norm`, for channels_last x `[B, C, h, w]`."""
    result, groups = torch.empty_like(x), module.num_groups
    grid, options = _tiles(x)
    parts = x.new_empty(2, *grid, x.shape[1], dtype=torch.float32)
    mean, rstd = x.new_empty(2, len(x), groups, dtype=torch.float32)
    _moments[grid](x, parts[0], parts[1], **options)
    finish, options_to_finish = _parts(x, groups, grid[1])
    _finish_moments[finish](parts[0], parts[1], mean, rstd, options["rows"], module.eps, **options_to_finish)
    grid, options = _tiles(x, 1)
    _apply_norm[grid](x, mean, rstd, module.weight, module.bias, result, groups=groups, SILU=silu, **options)
    return result, mean, rstd


def norm_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    module: torch.nn.GroupNorm,
    silu: bool,
) -> torch.Tensor:
    """As `recompute.torch_norm_backward`, for channels_last x."""
    gradient, result = gradient.contiguous(memory_format=torch.channels_last), torch.empty_like(x)
    grid, options = _tiles(x)
    parts = x.new_empty(2, *grid, x.shape[1], dtype=torch.float32)
    means = torch.empty_like(mean), torch.empty_like(mean)
    arguments = gradient, x, mean, rstd, module.weight, module.bias
    more: dict[str, int] = {"groups": module.num_groups, "SILU": silu, **options}
    _norm_sums[grid](*arguments, parts[0], parts[1], **more)
    finish, options_to_finish = _parts(x, module.num_groups, grid[1])
    _finish_sums[finish](parts[0], parts[1], *means, options["rows"], **options_to_finish)
    grid, options = _tiles(x, 1)
    _norm_gradient[grid](*arguments, *means, result, **more | options)
    return result


def _tiles(x: torch.Tensor, limit: int = 8) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid of programs and its constants. Each program computes some positions (rows of channels) of one picture.

    A program holds `ROWS` positions at once, in a loop of `TILES`. `TILES` is above 1 if there would be more than
    `PROGRAMS` programs, and at most `limit`.
    """
    batch, channels, height, width = x.shape
    places, wide = height * width, triton.next_power_of_2(channels)
    size = next(rows for rows in (64, 32, 16, 8, 4, 2, 1) if places % rows == 0 and rows * wide <= max(TILE, wide))
    pieces = places // size
    tiles = next(t for t in (8, 4, 2, 1) if t == 1 or (t <= limit and pieces % t == 0 and pieces // t >= PROGRAMS))
    options = {"channels": channels, "rows": size * tiles, "WIDTH": wide, "ROWS": size, "TILES": tiles}
    return (batch, pieces // tiles), options | {"num_warps": 8 if size * wide >= TILE else 4}


def _parts(x: torch.Tensor, groups: int, programs: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid and constants of the second pass: one program for each group of a picture, which sums the results of
    `programs` programs."""
    per_group = x.shape[1] // groups
    wide = triton.next_power_of_2(per_group)
    options = {"channels": x.shape[1], "groups": groups, "PROGRAMS": programs, "WIDTH": wide}
    return (len(x) * groups,), options | {"ROWS": max(1, min(triton.next_power_of_2(programs), TILE // wide))}


def quantize_rows(x: torch.Tensor, factors: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of a matrix whose columns are first multiplied by `factors`, and the float32 scale of each row."""
    x = x.contiguous()
    rows, columns = x.shape
    codes, scales = torch.empty_like(x, dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)
    width = triton.next_power_of_2(columns)
    _quantize_rows[(rows,)](x, factors, codes, scales, columns, HAS_FACTORS=factors is not None, WIDTH=width)
    return codes, scales


def scale_product(
    total: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Multiply an int32 matrix by a scale for each row and, if given, for each column; the result has `dtype`."""
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
    # Index of the value in rows of value and gate; the gate is `columns` further.
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
def _moments(  # type: ignore[no-untyped-def]
    x: tl.tensor,
    means: tl.tensor,
    squares: tl.tensor,
    channels: int,
    rows: int,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """For each channel over a program's positions: the mean, and the sum of squared differences from it.

    The first position is subtracted before, so that squares do not lose digits.
    """
    program, column = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1), tl.arange(0, WIDTH)
    inside, start = column < channels, program * rows * channels
    first = tl.load(x + start + column, mask=inside, other=0).to(tl.float32)
    total, square = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    for tile in range(TILES):
        at = start + (tile * ROWS + tl.arange(0, ROWS)[:, None]) * channels + column[None, :]
        difference = tl.load(x + at, mask=inside[None, :], other=0).to(tl.float32) - first[None, :]
        total += difference
        square += difference * difference
    off = tl.sum(total, axis=0) / rows
    tl.store(means + program * channels + column, first + off, mask=inside)
    tl.store(squares + program * channels + column, tl.sum(square, axis=0) - rows * off * off, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _finish_moments(  # type: ignore[no-untyped-def]
    means: tl.tensor,
    squares: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    rows: int,
    eps: float,
    channels: int,
    groups: int,
    PROGRAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Mean and 1 / standard deviation of a group, from its channels' means and squares over equal numbers of positions.

    The formula is from Chan, Golub and LeVeque 1979. The first mean is subtracted, so that squares do not lose digits.
    """
    batch, group = tl.program_id(0).to(tl.int64) // groups, tl.program_id(0).to(tl.int64) % groups
    per_group = channels // groups
    first = batch * PROGRAMS * channels + group * per_group
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    base = tl.load(means + first)
    total, square = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, PROGRAMS, ROWS):
        at, inside = first + (start + row) * channels + column, (start + row < PROGRAMS) & (column < per_group)
        difference = tl.load(means + at, mask=inside, other=0) - base
        difference = tl.where(inside, difference, 0.0)
        total += difference
        square += tl.load(squares + at, mask=inside, other=0) + rows * difference * difference
    count = PROGRAMS * per_group
    off = tl.sum(tl.sum(total, axis=1), axis=0) / count
    variance = tl.sum(tl.sum(square, axis=1), axis=0) / (count * rows) - off * off
    tl.store(mean + tl.program_id(0), base + off)
    tl.store(rstd + tl.program_id(0), 1 / tl.sqrt(variance + eps))


@triton.jit  # type: ignore[untyped-decorator]
def _finish_sums(  # type: ignore[no-untyped-def]
    sums: tl.tensor,
    products: tl.tensor,
    mean_sum: tl.tensor,
    mean_product: tl.tensor,
    rows: int,
    channels: int,
    groups: int,
    PROGRAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The means over a group of the sums of `_norm_sums`."""
    batch, group = tl.program_id(0).to(tl.int64) // groups, tl.program_id(0).to(tl.int64) % groups
    per_group = channels // groups
    first = batch * PROGRAMS * channels + group * per_group
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    total, product = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, PROGRAMS, ROWS):
        at, inside = first + (start + row) * channels + column, (start + row < PROGRAMS) & (column < per_group)
        total += tl.load(sums + at, mask=inside, other=0)
        product += tl.load(products + at, mask=inside, other=0)
    count = PROGRAMS * per_group * rows
    tl.store(mean_sum + tl.program_id(0), tl.sum(tl.sum(total, axis=1), axis=0) / count)
    tl.store(mean_product + tl.program_id(0), tl.sum(tl.sum(product, axis=1), axis=0) / count)


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
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    batch, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside, group = column < channels, batch * groups + column // (channels // groups)
    center, width = tl.load(mean + group, mask=inside, other=0), tl.load(rstd + group, mask=inside, other=0)
    factor = width * tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    program = batch * tl.num_programs(1) + tl.program_id(1)
    at = (program * rows + tl.arange(0, ROWS)[:, None]) * channels + column[None, :]
    y = tl.load(x + at, mask=inside[None, :], other=0).to(tl.float32)
    y = (y - center[None, :]) * factor[None, :] + shift[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(result + at, y.to(result.dtype.element_ty), mask=inside[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _normed(  # type: ignore[no-untyped-def]
    gradient: tl.tensor,
    x: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    center: tl.tensor,
    width: tl.tensor,
    factor: tl.tensor,
    shift: tl.tensor,
    SILU: tl.constexpr,
):
    """Normalized values at some positions, and their gradients, both `[ROWS, WIDTH]`."""
    normed = tl.load(x + at, mask=inside[None, :], other=0).to(tl.float32)
    normed = (normed - center[None, :]) * width[None, :]
    towards = tl.load(gradient + at, mask=inside[None, :], other=0).to(tl.float32) * factor[None, :]
    if SILU:
        y = normed * factor[None, :] + shift[None, :]
        share = tl.sigmoid(y)
        towards = towards * share * (1 + y * (1 - share))
    return normed, towards


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
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """For each channel over a program's positions: the sum of the gradients of the normalized values, and of their
    products with these values."""
    batch, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside, group = column < channels, batch * groups + column // (channels // groups)
    center, width = tl.load(mean + group, mask=inside, other=0), tl.load(rstd + group, mask=inside, other=0)
    factor = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    program = batch * tl.num_programs(1) + tl.program_id(1)
    total, product = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    for tile in range(TILES):
        at = (program * rows + tile * ROWS + tl.arange(0, ROWS)[:, None]) * channels + column[None, :]
        normed, towards = _normed(gradient, x, at, inside, center, width, factor, shift, SILU)
        total += towards
        product += towards * normed
    tl.store(sums + program * channels + column, tl.sum(total, axis=0), mask=inside)
    tl.store(products + program * channels + column, tl.sum(product, axis=0), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _norm_gradient(  # type: ignore[no-untyped-def]
    gradient: tl.tensor,
    x: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    mean_sum: tl.tensor,
    mean_product: tl.tensor,
    result: tl.tensor,
    channels: int,
    groups: int,
    rows: int,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    batch, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside, group = column < channels, batch * groups + column // (channels // groups)
    center, width = tl.load(mean + group, mask=inside, other=0), tl.load(rstd + group, mask=inside, other=0)
    factor = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    total = tl.load(mean_sum + group, mask=inside, other=0)
    product = tl.load(mean_product + group, mask=inside, other=0)
    program = batch * tl.num_programs(1) + tl.program_id(1)
    at = (program * rows + tl.arange(0, ROWS)[:, None]) * channels + column[None, :]
    normed, towards = _normed(gradient, x, at, inside, center, width, factor, shift, SILU)
    to = width[None, :] * (towards - total[None, :] - normed * product[None, :])
    tl.store(result + at, to.to(result.dtype.element_ty), mask=inside[None, :])
