"""Split of packed QKV and rotation, forward and backward. See kernels/rotary.py.

Bound by memory: every element is read and written once; the tables of a token are read by each of its blocks of heads. Rotation is
computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from megatronish.kernels.triton.ahead import Ahead, signature

_WARPS = 4


@triton.jit
def heads_at(q_ptr, k_ptr, v_ptr, token, group, member, repeats, G, K):
    """Where each head of the three contiguous tensors begins: [heads] of pointers, whichever the head belongs to."""
    query = q_ptr + ((token * G + group) * repeats + member) * K
    key = k_ptr + (token * G + group) * K
    value = v_ptr + (token * G + group) * K
    return tl.where(member < repeats, query, tl.where(member == repeats, key, value))


@triton.jit
def kernel(
    packed_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, token_stride, G, repeats, K, BACKWARD: tl.constexpr, R: tl.constexpr,
    RP: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """A block of one token's heads. Half of what is rotated is R elements, in RP lanes; REST lanes hold the others (0: none)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    exists = head < G * (repeats + 2)
    group, member = head // (repeats + 2), head % (repeats + 2)
    packed = packed_ptr + token * token_stride + head * K
    split = heads_at(q_ptr, k_ptr, v_ptr, token, group, member, repeats, G, K)
    source = (split if BACKWARD else packed)[:, None]
    target = (packed if BACKWARD else split)[:, None]
    pair = tl.arange(0, RP)
    mask = exists[:, None] & (pair < R)[None, :]
    cos = tl.load(cos_ptr + token * R + pair, mask=pair < R, other=1.0)[None, :]
    sin = tl.load(sin_ptr + token * R + pair, mask=pair < R, other=0.0)[None, :]
    if BACKWARD:
        sin = -sin  # a rotation's transpose is the rotation by the opposite angle
    is_value = (member == repeats + 1)[:, None]
    cos = tl.where(is_value, 1.0, cos)
    sin = tl.where(is_value, 0.0, sin)
    if INTERLEAVED:
        inner = tl.arange(0, 2 * RP)[None, :]
        whole = exists[:, None] & (inner < 2 * R)
        x = tl.load(source + inner, mask=whole, other=0.0)
        first, second = tl.split(tl.reshape(x.to(tl.float32), [HEADS, RP, 2]))
        turned = tl.join(first * cos - second * sin, second * cos + first * sin)
        tl.store(target + inner, tl.reshape(turned, [HEADS, 2 * RP]).to(x.dtype), mask=whole)
    else:
        x = tl.load(source + pair[None, :], mask=mask, other=0.0)
        first = x.to(tl.float32)
        second = tl.load(source + R + pair[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(target + pair[None, :], (first * cos - second * sin).to(x.dtype), mask=mask)
        tl.store(target + R + pair[None, :], (second * cos + first * sin).to(x.dtype), mask=mask)
    if REST > 0:
        inner = 2 * R + tl.arange(0, REST)[None, :]
        rest = exists[:, None] & (inner < K)
        tl.store(target + inner, tl.load(source + inner, mask=rest, other=0.0), mask=rest)


def _launch(
    packed_SBGqK: Tensor, cos: Tensor, sin: Tensor, split: tuple[Tensor, Tensor, Tensor], *, backward: bool, interleaved: bool
) -> None:
    S, B, G, q_and_2, K = packed_SBGqK.shape
    if not packed_SBGqK.numel():
        return
    half = cos.shape[-1]
    lanes, rest = triton.next_power_of_2(half), K - 2 * half
    heads_per_block = max(1, min(triton.next_power_of_2(G * q_and_2), 2048 // (2 * lanes)))
    kernel[(S * B, triton.cdiv(G * q_and_2, heads_per_block))](
        packed_SBGqK, cos.contiguous(), sin.contiguous(), *split, G * q_and_2 * K, G, q_and_2 - 2, K,
        BACKWARD=backward, R=half, RP=lanes, REST=triton.next_power_of_2(rest) if rest else 0, INTERLEAVED=interleaved,
        HEADS=heads_per_block, num_warps=_WARPS,
    )  # fmt: skip


def forward(qkv_SBGqK: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """[S, B, G, q + 2, K] -> q [S, B, G*q, K], k, v [S, B, G, K]. cos, sin: float32 [S, B, 1, R/2] for the first R elements."""
    S, B, G, q_and_2, K = qkv_SBGqK.shape
    query = qkv_SBGqK.new_empty(S, B, G * (q_and_2 - 2), K)
    key, value = qkv_SBGqK.new_empty(S, B, G, K), qkv_SBGqK.new_empty(S, B, G, K)
    _launch(qkv_SBGqK.contiguous(), cos, sin, (query, key, value), backward=False, interleaved=interleaved)
    return query, key, value


def backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The gradient of the packed projection."""
    S, B, G, K = dk.shape
    dqkv = dq.new_empty(S, B, G, dq.shape[2] // G + 2, K)
    split = (dq.contiguous(), dk.contiguous(), dv.contiguous())
    _launch(dqkv, cos, sin, split, backward=True, interleaved=interleaved)
    return dqkv


def ahead() -> Iterator[Ahead]:
    """Both layouts of a whole head of 128, and a partly rotated head of 80."""
    types = {"cos_ptr": "*fp32:16", "sin_ptr": "*fp32:16", "token_stride": "i32:16", "K": "i32:16"}
    for K, half, interleaved in ((128, 64, False), (128, 64, True), (80, 16, False)):
        lanes, rest = triton.next_power_of_2(half), K - 2 * half
        constants = {"R": half, "RP": lanes, "REST": triton.next_power_of_2(rest) if rest else 0, "INTERLEAVED": interleaved}
        constants["HEADS"] = 2048 // (2 * lanes)
        for backward_too, way in ((False, "forward"), (True, "backward")):
            name = f"rotary K{K} R{2 * half} {'interleaved' if interleaved else 'half'} {way}"
            yield Ahead(name, kernel, signature(kernel, "bf16", **types), {**constants, "BACKWARD": backward_too}, _WARPS)
