"""RMSNorm and LayerNorm, forward and backward, each with an optional residual that is added first. See kernels/{rms,layer}_norm.py.

A row up to `WHOLE` elements is read once and kept in registers; a longer one is read in chunks, again for each pass (it lies in L2
by then). Backward of whole rows: as many programs as the device runs at once go over all rows and keep dweight and dbias in
registers, so dy and x are read once; each leaves one row of partial sums, which are added in a fixed order. Longer rows have their
weight gradients summed by column, in a kernel of its own. No atomics: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatronish.kernels.registry import accumulate_dtype
from megatronish.kernels.triton.ahead import Ahead, signature
from megatronish.kernels.triton.launch import num_programs, num_warps, wide_of

WHOLE = 16384
"""Longest row that one program keeps in registers."""
WHOLE_BACKWARD = 8192
"""The same for backward, which keeps sums for weight and bias as well."""
_CHUNK = 8192
_COLUMNS, _ROW_GROUPS = 256, 64


@triton.jit
def forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    D,
    eps,
    CENTER: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * D
    y_ptr += row * D
    residual_ptr += row * D
    sum_ptr += row * D
    columns = tl.arange(0, BLOCK)
    if IS_WHOLE:
        mask = columns < D
        x = tl.load(x_ptr + columns, mask=mask, other=0.0)
        if HAS_RESIDUAL:
            # The sum is rounded, since it is what later layers see.
            x = (x.to(WIDE) + tl.load(residual_ptr + columns, mask=mask, other=0.0).to(WIDE)).to(x.dtype)
            tl.store(sum_ptr + columns, x, mask=mask)
        wide = x.to(WIDE)
        if CENTER:
            mean = tl.sum(wide, 0) / D
            tl.store(mean_ptr + row, mean)
            wide = tl.where(mask, wide - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / D + eps)
        tl.store(rstd_ptr + row, rstd)
        weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(WIDE)
        if CENTER:
            y = wide * rstd * weight + tl.load(bias_ptr + columns, mask=mask, other=0.0).to(WIDE)
        else:
            y = (wide * rstd).to(x.dtype).to(WIDE) * weight
        tl.store(y_ptr + columns, y.to(x.dtype), mask=mask)
    else:
        source = x_ptr
        total = tl.zeros([BLOCK], WIDE)
        if HAS_RESIDUAL or CENTER:
            for start in range(0, D, BLOCK):
                mask = start + columns < D
                x = tl.load(x_ptr + start + columns, mask=mask, other=0.0)
                if HAS_RESIDUAL:
                    x = (x.to(WIDE) + tl.load(residual_ptr + start + columns, mask=mask, other=0.0).to(WIDE)).to(x.dtype)
                    tl.store(sum_ptr + start + columns, x, mask=mask)
                total += x.to(WIDE)
        if HAS_RESIDUAL:
            source = sum_ptr
            tl.debug_barrier()  # other threads of the program read what was written here
        mean = tl.sum(total, 0) / D
        if CENTER:
            tl.store(mean_ptr + row, mean)
        squares = tl.zeros([BLOCK], WIDE)
        for start in range(0, D, BLOCK):
            mask = start + columns < D
            wide = tl.load(source + start + columns, mask=mask, other=0.0).to(WIDE)
            if CENTER:
                wide = tl.where(mask, wide - mean, 0.0)
            squares += wide * wide
        rstd = 1.0 / tl.sqrt(tl.sum(squares, 0) / D + eps)
        tl.store(rstd_ptr + row, rstd)
        for start in range(0, D, BLOCK):
            mask = start + columns < D
            x = tl.load(source + start + columns, mask=mask, other=0.0)
            weight = tl.load(weight_ptr + start + columns, mask=mask, other=0.0).to(WIDE)
            if CENTER:
                y = (x.to(WIDE) - mean) * rstd * weight
                y += tl.load(bias_ptr + start + columns, mask=mask, other=0.0).to(WIDE)
            else:
                y = (x.to(WIDE) * rstd).to(x.dtype).to(WIDE) * weight
            tl.store(y_ptr + start + columns, y.to(x.dtype), mask=mask)


@triton.jit
def backward_kernel(
    dy_ptr,
    dsum_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    num_rows,
    D,
    CENTER: tl.constexpr,
    HAS_DSUM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Whole rows, `tl.num_programs(0)` at a time; dweight and dbias [programs, D] get the partial sums."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < D
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(WIDE)
    dweight = tl.zeros([BLOCK], WIDE)
    dbias = tl.zeros([BLOCK], WIDE)
    for turn in range(tl.cdiv(num_rows - program, programs)):
        row = program + turn * programs
        at = row.to(tl.int64) * D + columns
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(WIDE)
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + row)
        wide = x.to(WIDE)
        if CENTER:
            wide = tl.where(mask, wide - tl.load(mean_ptr + row), 0.0)
        normed = wide * rstd
        dnormed = dy * weight
        dweight += dy * normed
        dx = dnormed - normed * (tl.sum(dnormed * normed, 0) / D)
        if CENTER:
            dbias += dy
            dx -= tl.sum(dnormed, 0) / D
        dx *= rstd
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + at, mask=mask, other=0.0).to(WIDE)
        tl.store(dx_ptr + at, dx.to(x.dtype), mask=mask)
    at = program.to(tl.int64) * D + columns
    tl.store(dweight_ptr + at, dweight, mask=mask)
    if CENTER:
        tl.store(dbias_ptr + at, dbias, mask=mask)


@triton.jit
def long_backward_kernel(
    dy_ptr,
    dsum_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    D,
    CENTER: tl.constexpr,
    HAS_DSUM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of one row, in chunks."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    rstd = tl.load(rstd_ptr + row)
    mean = tl.load(mean_ptr + row) if CENTER else rstd * 0.0
    product, total = tl.zeros([BLOCK], WIDE), tl.zeros([BLOCK], WIDE)
    for start in range(0, D, BLOCK):
        mask = start + columns < D
        at = row * D + start + columns
        dnormed = tl.load(dy_ptr + at, mask=mask, other=0.0).to(WIDE)
        dnormed *= tl.load(weight_ptr + start + columns, mask=mask, other=0.0).to(WIDE)
        product += dnormed * (tl.load(x_ptr + at, mask=mask, other=0.0).to(WIDE) - mean) * rstd
        total += dnormed
    product_mean, total_mean = tl.sum(product, 0) / D, tl.sum(total, 0) / D
    for start in range(0, D, BLOCK):
        mask = start + columns < D
        at = row * D + start + columns
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
        dx = tl.load(dy_ptr + at, mask=mask, other=0.0).to(WIDE)
        dx *= tl.load(weight_ptr + start + columns, mask=mask, other=0.0).to(WIDE)
        dx -= (x.to(WIDE) - mean) * rstd * product_mean
        if CENTER:
            dx -= total_mean
        dx *= rstd
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + at, mask=mask, other=0.0).to(WIDE)
        tl.store(dx_ptr + at, dx.to(x.dtype), mask=mask)


@triton.jit
def weight_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    dweight_ptr,
    dbias_ptr,
    num_rows,
    D,
    CENTER: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums of dweight and dbias over the rows group, group + groups, ... for `BLOCK` columns."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group, groups = tl.program_id(1), tl.num_programs(1)
    mask = columns < D
    dweight = tl.zeros([BLOCK], WIDE)
    dbias = tl.zeros([BLOCK], WIDE)
    for turn in range(tl.cdiv(num_rows - group, groups)):
        row = group + turn * groups
        at = row.to(tl.int64) * D + columns
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(WIDE)
        wide = tl.load(x_ptr + at, mask=mask, other=0.0).to(WIDE)
        if CENTER:
            wide -= tl.load(mean_ptr + row)
            dbias += dy
        dweight += dy * wide * tl.load(rstd_ptr + row)
    at = group.to(tl.int64) * D + columns
    tl.store(dweight_ptr + at, dweight, mask=mask)
    if CENTER:
        tl.store(dbias_ptr + at, dbias, mask=mask)


def norm_forward(
    x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(y, x + residual or x itself, 1 / deviation [..., 1], mean [..., 1] where there is a bias) of contiguous x [..., D]; RMSNorm
    where bias is None. Statistics are in the accumulation dtype."""
    D, center = x.shape[-1], bias_D is not None
    y = torch.empty_like(x)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=accumulate_dtype(x))
    mean = torch.empty_like(rstd) if center else None
    summed = x if residual is None else torch.empty_like(x)
    is_whole = D <= WHOLE
    block = triton.next_power_of_2(D) if is_whole else _CHUNK
    if rstd.numel():
        forward_kernel[(rstd.numel(),)](
            x, x if residual is None else residual, weight_D, weight_D if bias_D is None else bias_D, y, summed,
            rstd if mean is None else mean, rstd, D, eps,
            CENTER=center, HAS_RESIDUAL=residual is not None, WIDE=wide_of(x), BLOCK=block, IS_WHOLE=is_whole,
            num_warps=num_warps(block),
        )  # fmt: skip
    return y, summed, rstd, mean


def norm_backward(
    dy: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor, mean: Tensor | None, dsum: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx, dweight, dbias) of contiguous dy and x [..., D]; LayerNorm where `mean` is given. `dsum`, the gradient of the sum that a
    forward with a residual gave, is added to dx."""
    D, num_rows, center, wide = x.shape[-1], rstd.numel(), mean is not None, wide_of(x)
    dx = torch.empty_like(x)
    flags = {"CENTER": center, "WIDE": wide}
    given = (dy, dy if dsum is None else dsum, x, weight_D, rstd if mean is None else mean, rstd, dx)
    is_whole = D <= WHOLE_BACKWARD
    parts = min(num_programs(x.device), num_rows) if is_whole else min(_ROW_GROUPS, num_rows)
    dweight = rstd.new_empty((parts, D))
    dbias = torch.empty_like(dweight) if center else dweight
    if num_rows and is_whole:
        block = triton.next_power_of_2(D)
        backward_kernel[(parts,)](
            *given, dweight, dbias, num_rows, D, HAS_DSUM=dsum is not None, BLOCK=block, num_warps=num_warps(block), **flags
        )
    elif num_rows:
        long_backward_kernel[(num_rows,)](*given, D, HAS_DSUM=dsum is not None, BLOCK=_CHUNK, num_warps=num_warps(_CHUNK), **flags)
        grid = (triton.cdiv(D, _COLUMNS), parts)
        weight_kernel[grid](
            dy, x, rstd if mean is None else mean, rstd, dweight, dbias, num_rows, D, BLOCK=_COLUMNS, num_warps=4, **flags
        )
    return dx, dweight.sum(0).to(weight_D.dtype), dbias.sum(0).to(weight_D.dtype) if center else None


def ahead() -> Iterator[Ahead]:
    """The longest whole rows, and rows in chunks."""
    statistics = {"mean_ptr": "*fp32:16", "rstd_ptr": "*fp32:16"}
    gradients = {"dweight_ptr": "*fp32:16", "dbias_ptr": "*fp32:16"}
    for D, center in ((4096, False), (WHOLE_BACKWARD, True), (WHOLE, True), (65536, True)):
        name = f"{'layer' if center else 'rms'}_norm D{D}"
        flags = {"CENTER": center, "WIDE": tl.float32}
        forward = signature(forward_kernel, "bf16", D="i32:16", eps="fp32", **statistics)
        block = D if D <= WHOLE else _CHUNK
        constants = {**flags, "HAS_RESIDUAL": True, "BLOCK": block, "IS_WHOLE": D <= WHOLE}
        yield Ahead(f"{name} forward", forward_kernel, forward, constants, num_warps(block))
        is_whole = D <= WHOLE_BACKWARD
        kernel, block = (backward_kernel, D) if is_whole else (long_backward_kernel, _CHUNK)
        backward = signature(kernel, "bf16", D="i32:16", **statistics, **(gradients if is_whole else {}))
        yield Ahead(f"{name} backward", kernel, backward, {**flags, "HAS_DSUM": True, "BLOCK": block}, num_warps(block))
        if D > WHOLE:
            weights = signature(weight_kernel, "bf16", D="i32:16", **statistics, **gradients)
            yield Ahead(f"{name} weights", weight_kernel, weights, {**flags, "BLOCK": _COLUMNS}, 4)
