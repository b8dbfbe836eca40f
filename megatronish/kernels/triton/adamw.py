"""AdamW on a flat slice and the sum of squares, for GPUs. See kernels/adamw.py and kernels/square_sum.py.

AdamW is bound by memory (16 to 32 bytes an element, each read or written once): a program has `BLOCK` elements of every tensor in
flight, 16 bytes a thread and access. The square sum reads 4 bytes an element; its blocks have a fixed size and are added in a fixed
order, without atomics: the same bits every time, on any device.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatronish.kernels.adamw import SEGMENT_COLUMNS
from megatronish.kernels.triton.ahead import Ahead, signature

BLOCK = 1024
WARPS = 4
SUM_BLOCK = 16384
"""Elements of one partial sum: a part of what the result is."""
_SUM_STEP = 2048
_COLUMNS = tl.constexpr(len(SEGMENT_COLUMNS))


@triton.jit
def mix(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def rounded(x, random, STOCHASTIC: tl.constexpr):
    """float32 to bfloat16 (its pattern), to nearest even or by 16 random bits: Triton's interpreter gets its own wrong."""
    bits = x.to(tl.uint32, bitcast=True)
    result = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    result = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, result)
    if STOCHASTIC:
        result = tl.where((bits & 0x7F800000) == 0x7F800000, result, (bits + random) >> 16)
    return result.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def widened(x, NARROW: tl.constexpr):
    """A bfloat16 number's pattern (int16) as float32; what is float32 as it is."""
    if NARROW:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def adamw_kernel(
    master_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    scalars_ptr,
    low_ptr,
    segments_ptr,
    n,
    num_segments,
    decay,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    eps,
    lr,
    lr_rest,
    LOG2_BETA1: tl.constexpr,
    LOG2_BETA2: tl.constexpr,
    MASTER: tl.constexpr,
    NARROW: tl.constexpr,
    LOW: tl.constexpr,
    STEPS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # MASTER: "full", "halves" or "none"; NARROW: moments in bfloat16; LOW: "bf16", "fp16" or "".
    # STEPS: of the search for an element's segment, at least log2(num_segments) + 1; 0: there are none.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    scale = tl.zeros([BLOCK], tl.float32) + tl.load(scalars_ptr)
    wanted = inside & ((scale - scale) == 0)  # neither NaN nor infinite
    # Bias corrections, in float64 and rounded once; lr is the sum of two float32 numbers.
    step = tl.load(scalars_ptr + 1).to(tl.float64)
    rate = tl.cast(lr, tl.float64) + tl.cast(lr_rest, tl.float64)
    step_size = (rate / (1.0 - tl.exp2(step * LOG2_BETA1))).to(tl.float32)
    root_correction = tl.sqrt(1.0 - tl.exp2(step * LOG2_BETA2)).to(tl.float32)

    g = tl.load(grad_ptr + i, mask=wanted, other=0.0) * scale
    first = widened(tl.load(exp_avg_ptr + i, mask=wanted, other=0), NARROW)
    second = widened(tl.load(exp_avg_sq_ptr + i, mask=wanted, other=0), NARROW)
    old = tl.load(master_ptr + i, mask=wanted, other=0)
    if MASTER == "halves":
        upper = tl.load(low_ptr + i, mask=wanted, other=0).to(tl.int32) << 16
        old = (upper + old.to(tl.int32)).to(tl.float32, bitcast=True)
    else:
        old = widened(old, MASTER == "none")

    kept = tl.zeros([BLOCK], tl.float32) + decay
    word = tl.zeros([BLOCK], tl.uint32)
    if STEPS > 0:
        low_end = tl.zeros([BLOCK], tl.int32)
        high_end = tl.zeros([BLOCK], tl.int32) + (num_segments - 1)
        for _ in range(STEPS):
            middle = (low_end + high_end) // 2
            beyond = tl.load(segments_ptr + middle * _COLUMNS) <= i
            low_end = tl.where(beyond & (low_end < high_end), middle + 1, low_end)
            high_end = tl.where(beyond, high_end, middle)
        row_ptr = segments_ptr + low_end * _COLUMNS
        kept = tl.where(tl.load(row_ptr + 1) != 0, kept, 1.0)
        if STOCHASTIC:
            key = tl.load(row_ptr + 2)
            local = i + tl.load(row_ptr + 3)
            inner = tl.load(row_ptr + 4)
            index = local // inner * tl.load(row_ptr + 5) + tl.load(row_ptr + 6) + local % inner
            t = tl.load(scalars_ptr + 1).to(tl.int32).to(tl.uint32, bitcast=True)
            key0 = mix((key & 0xFFFFFFFF).to(tl.uint32) ^ mix(((key >> 32) & 0xFFFFFFFF).to(tl.uint32) ^ mix(t)))
            key1 = mix(key0 ^ (0x9E3779B9 + ((index >> 32) & 0xFFFFFFFF).to(tl.uint32)))
            word = mix(mix((index & 0xFFFFFFFF).to(tl.uint32) ^ key0) + key1)

    first = first + one_minus_beta1 * (g - first)
    second = second * beta2 + one_minus_beta2 * g * g
    denominator = tl.div_rn(tl.sqrt_rn(second), root_correction) + eps
    new = old * kept - step_size * tl.div_rn(first, denominator)

    if NARROW:
        tl.store(exp_avg_ptr + i, rounded(first, word >> 16, STOCHASTIC), mask=wanted)
        tl.store(exp_avg_sq_ptr + i, rounded(second, word & 0xFFFF, STOCHASTIC), mask=wanted)
    else:
        tl.store(exp_avg_ptr + i, first, mask=wanted)
        tl.store(exp_avg_sq_ptr + i, second, mask=wanted)
    if MASTER == "halves":
        bits = new.to(tl.uint32, bitcast=True)
        tl.store(low_ptr + i, ((bits + 0x8000) >> 16).to(tl.uint16).to(tl.int16, bitcast=True), mask=wanted)
        tl.store(master_ptr + i, (bits & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True), mask=wanted)
    elif MASTER == "none":
        tl.store(master_ptr + i, rounded(new, mix(word + 0x9E3779B9) >> 16, STOCHASTIC), mask=wanted)
    else:
        tl.store(master_ptr + i, new, mask=wanted)
        if LOW == "bf16":
            tl.store(low_ptr + i, rounded(new, word, False), mask=wanted)
        if LOW == "fp16":
            tl.store(low_ptr + i, new.to(tl.float16), mask=wanted)
    if ZERO:
        tl.store(grad_ptr + i, tl.zeros([BLOCK], tl.float32), mask=inside)


def _log2(beta: float) -> float:
    return math.log2(beta) if beta > 0 else -math.inf


def _pattern(x: Tensor) -> Tensor:
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def refuses(master: Tensor, grad: Tensor, *others: object) -> str | None:
    """Why a call of the op cannot run here, or None."""
    return "float64: its constants would pass as float32" if grad.dtype == torch.float64 else None


def forward(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    low: Tensor | None,
    numbers: list[float],
    segments: Tensor | None,
    rounding: str,
    zero_grad: bool,
) -> None:
    """The op of kernels/adamw.py, in one launch."""
    n = grad.numel()
    if n == 0:
        return
    lr, beta1, beta2, eps, weight_decay = numbers
    lr_rounded = struct.unpack("f", struct.pack("f", lr))[0]
    rows = 0 if segments is None else len(segments)
    adamw_kernel[(triton.cdiv(n, BLOCK),)](
        _pattern(master),
        grad,
        _pattern(exp_avg),
        _pattern(exp_avg_sq),
        scalars,
        _pattern(low) if low is not None else grad,
        segments if segments is not None else grad,
        n,
        rows,
        1.0 - lr * weight_decay,
        beta2,
        1.0 - beta1,
        1.0 - beta2,
        eps,
        lr_rounded,
        lr - lr_rounded,
        LOG2_BETA1=_log2(beta1),
        LOG2_BETA2=_log2(beta2),
        MASTER={torch.float32: "full", torch.int16: "halves", torch.bfloat16: "none"}[master.dtype],
        NARROW=exp_avg.dtype == torch.bfloat16,
        LOW="" if low is None else {torch.bfloat16: "bf16", torch.float16: "fp16"}[low.dtype],
        STEPS=0 if segments is None else max(4, (rows - 1).bit_length() + 1),
        STOCHASTIC=rounding == "stochastic" and torch.bfloat16 in (exp_avg.dtype, master.dtype),
        ZERO=zero_grad,
        BLOCK=BLOCK,
        num_warps=WARPS,
        # As the reference: a product and a sum are two roundings.
        enable_fp_fusion=False,
    )


@triton.jit
def square_sum_kernel(x_ptr, partials_ptr, n, SUM_BLOCK: tl.constexpr, STEP: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * SUM_BLOCK
    lanes = tl.zeros([STEP], tl.float64)
    for at in range(0, SUM_BLOCK, STEP):
        i = start + at + tl.arange(0, STEP)
        x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float64)
        lanes += x * x
    tl.store(partials_ptr + tl.program_id(0), tl.sum(lanes))


@triton.jit
def total_kernel(partials_ptr, out_ptr, count, STEP: tl.constexpr):
    lanes = tl.zeros([STEP], tl.float64)
    for at in range(0, count, STEP):
        i = at + tl.arange(0, STEP)
        lanes += tl.load(partials_ptr + i, mask=i < count, other=0.0)
    tl.store(out_ptr, tl.sum(lanes))


def square_sum(tensors: list[Tensor]) -> Tensor:
    """The op of kernels/square_sum.py: a launch a tensor, and one that adds what they left."""
    blocks = [triton.cdiv(t.numel(), SUM_BLOCK) for t in tensors]
    partials = torch.empty(sum(blocks), dtype=torch.float64, device=tensors[0].device)
    out = torch.empty((), dtype=torch.float64, device=tensors[0].device)
    for tensor, part, size in zip(tensors, partials.split(blocks), blocks, strict=True):
        if size:
            square_sum_kernel[(size,)](tensor, part, tensor.numel(), SUM_BLOCK=SUM_BLOCK, STEP=_SUM_STEP, num_warps=WARPS)
    total_kernel[(1,)](partials, out, partials.numel(), STEP=_SUM_STEP, num_warps=WARPS)
    return out


def ahead() -> Iterator[Ahead]:
    """Every kind of master and moment, with and without segments."""
    for name, master, narrow, steps, stochastic in (
        ("float32", "full", False, 0, False),
        ("float32, segments", "full", False, 8, False),
        ("halves", "halves", True, 0, False),
        ("halves, by chance", "halves", True, 8, True),
        ("no master, by chance", "none", True, 8, True),
    ):
        moments = "i16" if narrow else "fp32"
        pointers = {"exp_avg_ptr": moments, "exp_avg_sq_ptr": moments, "low_ptr": "i16", "segments_ptr": "i64"}
        pointers["master_ptr"] = "fp32" if master == "full" else "i16"
        types = {key: f"*{value}:16" for key, value in pointers.items()} | {"n": "i32:16"}
        floats = dict.fromkeys(("decay", "beta2", "one_minus_beta1", "one_minus_beta2", "eps", "lr", "lr_rest"), "fp32")
        constants = {
            "LOG2_BETA1": math.log2(0.9),
            "LOG2_BETA2": math.log2(0.95),
            "MASTER": master,
            "NARROW": narrow,
            "LOW": "" if master == "none" else "bf16",
            "STEPS": steps,
            "STOCHASTIC": stochastic,
            "ZERO": True,
            "BLOCK": BLOCK,
        }
        yield Ahead(f"adamw {name}", adamw_kernel, signature(adamw_kernel, "fp32", **types, **floats), constants, WARPS)
    sums = signature(square_sum_kernel, "fp32", partials_ptr="*fp64:16", n="i32:16")
    yield Ahead("square_sum", square_sum_kernel, sums, {"SUM_BLOCK": SUM_BLOCK, "STEP": _SUM_STEP}, WARPS)
    yield Ahead("square_sum total", total_kernel, signature(total_kernel, "fp64"), {"STEP": _SUM_STEP}, WARPS)
