"""The local part of cross entropy and its gradient. See kernels/cross_entropy.py.

Both are bound by memory: forward reads the logits once (2 bytes an element of bfloat16), backward reads and writes them once, in
place where `grad` is the logits. A row is summed in a fixed order, without atomics: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatronish.kernels.triton.ahead import Ahead, signature

_ROW_BLOCK, _ROW_WARPS = 8192, 8
"""Forward: 32 elements a thread, four loads of 16 bytes in flight; one exchange between warps (the maximum) each 8192 elements."""
_GRADIENT_BLOCK, _GRADIENT_WARPS = 4096, 4


@triton.jit
def parts_kernel(
    logits_ptr, labels_ptr, parts_ptr, num_tokens, row_stride, first_row, num_valid, WITH_SUM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One token: parts [3 or 4, num_tokens] float32."""
    token = tl.program_id(0).to(tl.int64)
    # A row begins beyond 2^31 elements where tokens x vocabulary do; within a row 32 bits do.
    logits_ptr += token * row_stride
    columns = tl.arange(0, BLOCK)
    largest = tl.full([], float("-inf"), tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_valid, BLOCK):
        mask = start + columns < num_valid
        x = tl.load(logits_ptr + start + columns, mask=mask, other=float("-inf")).to(tl.float32)
        now = tl.maximum(largest, tl.max(x, 0))
        # Nothing but -inf so far: not inf - inf.
        base = tl.where(now == float("-inf"), 0.0, now)
        weights = weights * tl.exp(largest - base) + tl.exp(x - base)
        if WITH_SUM:
            total += tl.where(mask, x, 0.0)
        largest = now
    place = tl.load(labels_ptr + token) - first_row
    here = (place >= 0) & (place < num_valid)
    picked = tl.load(logits_ptr + place, mask=here, other=0.0).to(tl.float32)
    tl.store(parts_ptr + token, largest)
    tl.store(parts_ptr + num_tokens + token, tl.sum(weights, 0))
    tl.store(parts_ptr + 2 * tl.cast(num_tokens, tl.int64) + token, picked)
    if WITH_SUM:
        tl.store(parts_ptr + 3 * tl.cast(num_tokens, tl.int64) + token, tl.sum(total, 0))


@triton.jit
def gradient_kernel(
    dloss_ptr, logits_ptr, labels_ptr, log_sum_exp_ptr, grad_ptr, logits_stride, grad_stride, V, num_blocks, first_row, num_valid,
    target_weight, uniform_weight, z_loss, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one token's columns. grad may be the logits: an element is written by the thread that has read it."""
    token = (tl.program_id(0) // num_blocks).to(tl.int64)
    columns = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    valid = columns < num_valid
    x = tl.load(logits_ptr + token * logits_stride + columns, mask=valid, other=0.0)
    log_sum_exp = tl.load(log_sum_exp_ptr + token)
    place = tl.load(labels_ptr + token) - first_row
    dloss = tl.load(dloss_ptr + token)
    grad = tl.exp(x.to(tl.float32) - log_sum_exp) * (1.0 + 2.0 * z_loss * log_sum_exp) - uniform_weight
    grad = (grad - tl.where(columns == place, target_weight, 0.0)) * dloss
    tl.store(grad_ptr + token * grad_stride + columns, tl.where(valid, grad, 0.0).to(x.dtype), mask=columns < V)


def forward(logits_TV: Tensor, labels_T: Tensor, first_row: int, num_valid: int, with_sum: bool = False) -> Tensor:
    """[3 or 4, T] float32: the rows of `cross_entropy_parts`."""
    T = logits_TV.shape[0]
    parts_PT = logits_TV.new_empty((4 if with_sum else 3, T), dtype=torch.float32)
    if T:
        parts_kernel[(T,)](
            logits_TV, labels_T.contiguous(), parts_PT, T, logits_TV.stride(0), first_row, num_valid,
            WITH_SUM=with_sum, BLOCK=_ROW_BLOCK, num_warps=_ROW_WARPS,
        )  # fmt: skip
    return parts_PT


def backward(
    dloss_T: Tensor,
    logits_TV: Tensor,
    labels_T: Tensor,
    log_sum_exp_T: Tensor,
    grad_TV: Tensor,
    first_row: int,
    num_valid: int,
    target_weight: float = 1.0,
    uniform_weight: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    """Write the gradient to grad_TV, which may be logits_TV."""
    T, V = logits_TV.shape
    num_blocks = triton.cdiv(V, _GRADIENT_BLOCK)
    if logits_TV.numel():
        gradient_kernel[(T * num_blocks,)](
            dloss_T.contiguous(), logits_TV, labels_T.contiguous(), log_sum_exp_T.contiguous(), grad_TV,
            logits_TV.stride(0), grad_TV.stride(0), V, num_blocks, first_row, num_valid, target_weight, uniform_weight, z_loss,
            BLOCK=_GRADIENT_BLOCK, num_warps=_GRADIENT_WARPS,
        )  # fmt: skip


def ahead() -> Iterator[Ahead]:
    """Forward with and without the sum that label smoothing needs, and backward; also where integers are 1, which Triton makes
    constants."""
    for with_sum in (False, True):
        types = {"labels_ptr": "*i64:16", "parts_ptr": "*fp32:16", "row_stride": "i32:16", "num_valid": "i32:16"}
        name = f"cross_entropy parts{' and sum' if with_sum else ''}"
        constants = {"WITH_SUM": with_sum, "BLOCK": _ROW_BLOCK}
        given = signature(parts_kernel, "bf16", **types)
        yield Ahead(name, parts_kernel, given, constants, _ROW_WARPS)
        ones = dict.fromkeys(("num_tokens", "row_stride", "first_row", "num_valid"), 1)
        yield Ahead(f"{name} of one token", parts_kernel, given, constants | ones, _ROW_WARPS)
    types = {"labels_ptr": "*i64:16", "dloss_ptr": "*fp32:16", "log_sum_exp_ptr": "*fp32:16"}
    types |= dict.fromkeys(("logits_stride", "grad_stride", "V", "num_valid"), "i32:16")
    types |= dict.fromkeys(("target_weight", "uniform_weight", "z_loss"), "fp32")
    given = signature(gradient_kernel, "bf16", **types)
    constants = {"BLOCK": _GRADIENT_BLOCK}
    yield Ahead("cross_entropy backward", gradient_kernel, given, constants, _GRADIENT_WARPS)
    constants |= dict.fromkeys(("logits_stride", "grad_stride", "V", "num_blocks", "first_row", "num_valid"), 1)
    yield Ahead("cross_entropy backward of one column", gradient_kernel, given, constants, _GRADIENT_WARPS)
