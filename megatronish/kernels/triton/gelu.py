"""residual + dropout(gelu(x + bias)), forward and backward; each part but x may be left out. See kernels/gelu.py and
kernels/bias_gelu_dropout_add.py.

Bound by memory: each array is read or written once. Computed in float32, rounded once. Dropout draws one Philox block for four
elements. Programs go over some rows of a block of columns and keep that block's share of the bias's gradient, which is added up in
a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatronish.kernels.triton.ahead import Ahead, signature
from megatronish.kernels.triton.launch import num_programs

_BLOCK, _WARPS = 1024, 4
"""8 elements a thread of each array: 16 bytes of bfloat16."""


@triton.jit
def gelu_and_slope(x):
    """(gelu(x), gelu'(x)) by GPT-2's formula; tanh(z) = 2 sigmoid(2 z) - 1, which does not overflow."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    tanh = 2.0 * tl.sigmoid(2.0 * inner) - 1.0
    slope = 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
    return 0.5 * x * (1.0 + tanh), slope


@triton.jit
def kept_kernel(first_block, sample, key, threshold, BLOCK: tl.constexpr):
    """bool [BLOCK]: the bits of elements 4 first_block, 4 first_block + 1, ... of a sample (see comm/random.py)."""
    block = first_block + tl.arange(0, BLOCK // 4).to(tl.int64)
    zeros = (block * 0).to(tl.uint32)
    a, b, c, d = tl.philox(
        key, block.to(tl.uint32), (block >> 32).to(tl.uint32), zeros + sample.to(tl.uint32), zeros + (sample >> 32).to(tl.uint32)
    )
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK])
    return bits.to(tl.uint32, bitcast=True).to(tl.int64) >= threshold


@triton.jit
def kernel(
    dy_ptr, x_ptr, bias_ptr, residual_ptr, samples_ptr, out_ptr, dbias_ptr, num_rows, B, D, first, key, threshold, kept_scale,
    BACKWARD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, GELU: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows group, group + groups, ... of x [S, B, D], row s B + b, for one block of columns. Forward writes y to `out`,
    backward dx, and partial sums [groups, D] float32 to `dbias`. ALIGNED: 4 divides D, so that every row begins a Philox block."""
    group, groups = tl.program_id(1), tl.num_programs(1)
    sums = tl.zeros([BLOCK], tl.float32)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for turn in range(tl.cdiv(num_rows - group, groups)):
        row = group + turn * groups
        element = (first + row // B).to(tl.int64) * D
        columns = places
        if not ALIGNED:
            columns = places - (element % 4).to(tl.int32)
        mask = (columns >= 0) & (columns < D)
        at = row.to(tl.int64) * D + columns
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
        wide = x.to(tl.float32)
        if HAS_BIAS:
            wide += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        if GELU:
            value, slope = gelu_and_slope(wide)
        else:
            value, slope = wide, 1.0
        out = value
        if BACKWARD:
            out = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32) * slope
        if HAS_DROPOUT:
            sample = tl.load(samples_ptr + row % B)
            kept = kept_kernel(element // 4 + tl.program_id(0) * (BLOCK // 4), sample, key, threshold, BLOCK)
            out = tl.where(kept, out * kept_scale, 0.0)
        if HAS_RESIDUAL and not BACKWARD:
            out += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, out.to(x.dtype), mask=mask)
        if BACKWARD and HAS_BIAS:
            sums += tl.where(mask, out, 0.0)
    if BACKWARD and HAS_BIAS:
        # Only where ALIGNED are a program's columns the same in every row.
        tl.store(dbias_ptr + group.to(tl.int64) * D + places, sums, mask=places < D)


def _launch(
    x: Tensor, out: Tensor, *, dy: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None,
    samples_B: Tensor | None = None, dbias: Tensor | None = None, num_groups: int, first: int = 0, key: int = 0, rate: float = 0.0,
    use_gelu: bool,
) -> None:  # fmt: skip
    D = x.shape[-1]
    num_rows, B = x.numel() // max(1, D), x.shape[1] if samples_B is not None else 1
    aligned = samples_B is None or D % 4 == 0
    grid = (triton.cdiv(D if aligned else D + 3, _BLOCK), num_groups)
    given = (x if t is None else t.contiguous() for t in (dy, x, bias, residual, samples_B, out, dbias))
    kernel[grid](
        *given, num_rows, B, D, first, key, round(rate * 2.0**32), 1.0 / (1.0 - rate),
        BACKWARD=dy is not None, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, HAS_DROPOUT=samples_B is not None,
        GELU=use_gelu, ALIGNED=aligned, BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip


def _num_groups(x: Tensor) -> int:
    """Programs that share the rows of a block of columns: some turns each, enough programs to fill the device."""
    num_rows, blocks = x.numel() // max(1, x.shape[-1]), triton.cdiv(x.shape[-1], _BLOCK)
    return max(1, min(num_rows, triton.cdiv(num_programs(x.device, 16), blocks)))


def gelu(x: Tensor) -> Tensor:
    """[..., F] -> [..., F]."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        _launch(x, out, num_groups=_num_groups(x), use_gelu=True)
    return out


def gelu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """dx."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        _launch(x, out, dy=dy.contiguous(), num_groups=_num_groups(x), use_gelu=True)
    return out


def forward(
    x_SBD: Tensor,
    bias_D: Tensor | None,
    residual_SBD: Tensor | None,
    samples_B: Tensor | None,
    use_gelu: bool,
    first: int,
    key: int,
    rate: float,
) -> Tensor:
    """residual + dropout(gelu(x + bias)), [S, B, D]."""
    x = x_SBD.contiguous()
    out = torch.empty_like(x)
    residual = None if residual_SBD is None else residual_SBD.contiguous()
    if x.numel():
        _launch(
            x, out, bias=bias_D, residual=residual, samples_B=samples_B, num_groups=_num_groups(x), first=first, key=key, rate=rate,
            use_gelu=use_gelu,
        )  # fmt: skip
    return out


def backward(
    dy_SBD: Tensor,
    x_SBD: Tensor,
    bias_D: Tensor | None,
    samples_B: Tensor | None,
    use_gelu: bool,
    first: int,
    key: int,
    rate: float,
) -> tuple[Tensor, Tensor]:
    """(dx, dbias or nothing [0])."""
    x, D = x_SBD.contiguous(), x_SBD.shape[-1]
    out, num_groups = torch.empty_like(x), _num_groups(x)
    dbias = x.new_zeros((num_groups, 0 if bias_D is None else D), dtype=torch.float32)
    if x.numel():
        _launch(
            x, out, dy=dy_SBD.contiguous(), bias=bias_D, samples_B=samples_B, dbias=dbias, num_groups=num_groups, first=first,
            key=key, rate=rate, use_gelu=use_gelu,
        )  # fmt: skip
    return out, dbias.sum(0).to(x.dtype)


def ahead() -> Iterator[Ahead]:
    """GELU alone, and with all that may surround it."""
    types = {
        "samples_ptr": "*i64:16",
        "dbias_ptr": "*fp32:16",
        "D": "i32:16",
        "key": "i64",
        "threshold": "i64",
        "kept_scale": "fp32",
    }
    cases = {"gelu": (False, False), "bias_gelu_dropout_add": (True, True)}
    for name, (has_bias, has_dropout) in cases.items():
        for backward_too, way in ((False, "forward"), (True, "backward")):
            constants = {"BACKWARD": backward_too, "HAS_BIAS": has_bias, "HAS_RESIDUAL": has_dropout, "HAS_DROPOUT": has_dropout}
            constants |= {"GELU": True, "ALIGNED": True}
            yield Ahead(f"{name} {way}", kernel, signature(kernel, "bf16", **types), {**constants, "BLOCK": _BLOCK}, _WARPS)
