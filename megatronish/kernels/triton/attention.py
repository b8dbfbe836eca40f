"""Attention with no S x T tensor (Dao 2023), forward and backward: causal or full, sliding window, documents, grouped heads, ALiBi,
dropout that is drawn again in backward. See kernels/attention.py.

Query s stands at place s + T - S of the keys. Scores are kept in units of log 2 (scale x log2 e), for exp2. Backward makes each
block of scores again from the log-sum-exp, once for dQ (a program a block of queries) and once for dK and dV (a program a block of
keys, over all heads of its group): no atomics, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatronish.kernels.triton.ahead import Ahead, signature
from megatronish.kernels.triton.launch import architecture

LOG2_E = tl.constexpr(1.4426950408889634)
HEAD_SIZES = range(8, 257, 8)
MOST_HEADS = 2**16 - 1
"""Samples times heads: the second dimension of a grid takes no more."""
NARROW = (86, 89, 120, 121)
"""Compute capabilities (x 10) whose blocks may take 99 KiB of shared memory: the cuts of sm_80 for heads up to 128 fit (96 KiB)."""
LARGEST_NARROW = 128
UNSPECIALISED = ("document_stride", "H", "repeats", "first_head", "key", "threshold")
"""What a launch would make a constant where it is 1: what `ahead` measures is then not what runs."""


@dataclass(frozen=True)
class Masks:
    """What of the scores counts. `window`: a query sees the keys less than so many places away; 0: all. `documents_TB`: int64,
    equal numbers see each other (S = T then). `slopes_H`, none negative: ALiBi (Press et al. 2021) adds -slope x distance. `rate`,
    `key`, `samples_B`, `first_head`: dropout of the weights, as in kernels/dropout.py at coordinates (head, query, key)."""

    causal: bool = True
    window: int = 0
    documents_TB: Tensor | None = None
    slopes_H: Tensor | None = None
    samples_B: Tensor | None = None
    first_head: int = 0
    key: int = 0
    rate: float = 0.0


@triton.jit
def scores_kernel(
    a, b, rows, columns, S, T, scale_log2, slope, documents_ptr, document_stride, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, HAS_SLOPES: tl.constexpr, MASKED: tl.constexpr, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scaled scores in units of log 2, -inf where a query may not look: [queries, keys] of a = Q and b = K^T, or, KEYS_FIRST,
    [keys, queries] of a = K and b = Q^T."""
    scores = tl.dot(a, b, input_precision=PRECISION) * scale_log2
    place = rows + (T - S)
    distance = place[None, :] - columns[:, None] if KEYS_FIRST else place[:, None] - columns[None, :]
    if HAS_SLOPES:
        scores -= slope * tl.abs(distance).to(tl.float32)
    if MASKED:
        # Queries past the last, and keys where they come first, give nothing that is kept.
        seen = distance == distance if KEYS_FIRST else (columns < T)[None, :]
        if CAUSAL:
            seen = seen & (distance >= 0)
        if WINDOW > 0:
            seen = seen & (distance < WINDOW) & (distance > -WINDOW)
        if HAS_DOCUMENTS:
            of_rows = tl.load(documents_ptr + rows * document_stride, mask=rows < S, other=-1)
            of_columns = tl.load(documents_ptr + columns * document_stride, mask=columns < T, other=-2)
            same = of_rows[None, :] == of_columns[:, None] if KEYS_FIRST else of_rows[:, None] == of_columns[None, :]
            seen = seen & same
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def kept_kernel(rows, columns, S, T, head, sample, key, threshold, KEYS_FIRST: tl.constexpr):
    """bool [queries, keys], or [keys, queries]: word e % 4 of Philox block e // 4 is at least `threshold`, for element
    e = (head S + row) T + column."""
    first = (head.to(tl.int64) * S + rows.to(tl.int64)) * T
    column = columns.to(tl.int64)
    element = first[None, :] + column[:, None] if KEYS_FIRST else first[:, None] + column[None, :]
    block = element // 4
    zeros = (block * 0).to(tl.uint32)
    a, b, c, d = tl.philox(
        key, block.to(tl.uint32), (block >> 32).to(tl.uint32), zeros + sample.to(tl.uint32), zeros + (sample >> 32).to(tl.uint32)
    )
    word = element % 4
    bits = tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, c, d)))
    return bits.to(tl.uint32, bitcast=True).to(tl.int64) >= threshold


@triton.jit
def load_rows(ptr, index, size, stride, K: tl.constexpr, KP: tl.constexpr):
    """[index, KP] of a [size, K] matrix; zeros outside."""
    inner = tl.arange(0, KP)
    at = ptr + index.to(tl.int64)[:, None] * stride + inner[None, :]
    return tl.load(at, mask=(index < size)[:, None] & (inner < K)[None, :], other=0.0)


@triton.jit
def load_tile(
    source, first, size, stride, sample, head, ROWS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """[ROWS, KP] from row `first` on, zeros outside: of the [size, K] matrix that a pointer points to, or, TMA, of that of one
    sample and head in a descriptor of [samples, heads, size, K]."""
    if TMA > 0:
        return source.load([sample, head, first, 0]).reshape(ROWS, KP)
    else:
        return load_rows(source, first + tl.arange(0, ROWS), size, stride, K, KP)


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, documents_ptr, slopes_ptr, samples_ptr,
    q_stride_s, q_stride_b, q_stride_h, k_stride_t, k_stride_b, k_stride_g, v_stride_t, v_stride_b, v_stride_g,
    document_stride, S, T, H, repeats, scale_log2, first_head, key, threshold, kept_scale,
    K: tl.constexpr, KP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, SCALE_LATE: tl.constexpr,
):  # fmt: skip
    """One block of M queries of one head. out is contiguous [S, B, H, K], lse [B, H, S] float32, documents [T, B].

    TMA: 0 pointers; 1 and 2 warps that load, through descriptors, and warps that compute; 1 two loops and a descriptor of Q, 2 one
    loop, and Q's descriptor is made here: triton's pass for Hopper takes nothing else. SCALE_LATE: the scale, positive, goes into
    the exponent (one fused multiply-add an element)."""
    # The longest rows first: of causal blocks the last do the most.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, head = tl.program_id(1) // H, tl.program_id(1) % H
    num_samples = tl.num_programs(1) // H
    group = head // repeats
    rows = block * M + tl.arange(0, M)
    if TMA != 1:
        q_ptr += sample.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    if TMA == 0:
        k_ptr += sample.to(tl.int64) * k_stride_b + group.to(tl.int64) * k_stride_g
        v_ptr += sample.to(tl.int64) * v_stride_b + group.to(tl.int64) * v_stride_g
    documents_ptr += sample
    if TMA == 2:
        made = tl.make_tensor_descriptor(q_ptr, [S, K], [q_stride_s.to(tl.int64), tl.constexpr(1)], [M, KP])
        q = made.load([block * M, 0])
    else:
        q = load_tile(q_ptr, block * M, S, q_stride_s, sample, head, M, K, KP, TMA)
    slope = tl.load(slopes_ptr + head) * LOG2_E if HAS_SLOPES else 0.0
    number = tl.load(samples_ptr + sample) if HAS_DROPOUT else tl.zeros([], tl.int64)
    begin, end = 0, T
    first_place = block * M + T - S
    if CAUSAL:
        end = tl.minimum(T, tl.maximum(0, first_place + M))
    if WINDOW > 0:
        begin = tl.maximum(0, first_place - WINDOW + 1) // N * N
        if not CAUSAL:
            end = tl.minimum(T, tl.maximum(0, first_place + M + WINDOW - 1))
    # Of these blocks of keys every query sees all.
    whole = begin
    if WINDOW == 0 and not HAS_DOCUMENTS and TMA != 2:
        whole = T // N * N
        if CAUSAL:
            whole = tl.minimum(whole, tl.maximum(0, first_place + 1) // N * N)
    largest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, KP], tl.float32)
    ONLY_MASKED: tl.constexpr = WINDOW > 0 or HAS_DOCUMENTS or TMA == 2
    factor = scale_log2 if SCALE_LATE else 1.0
    for MASKED in tl.static_range(1 if ONLY_MASKED else 0, 2):
        start, stop = (whole, end) if MASKED else (begin, whole)
        for column in tl.range(start, stop, N, warp_specialize=TMA > 0):
            columns = column + tl.arange(0, N)
            k = tl.trans(load_tile(k_ptr, column, T, k_stride_t, sample, group, N, K, KP, TMA))
            scores = scores_kernel(
                q, k, rows, columns, S, T, 1.0 if SCALE_LATE else scale_log2, slope, documents_ptr, document_stride, CAUSAL, WINDOW,
                HAS_DOCUMENTS, HAS_SLOPES, MASKED, False, PRECISION,
            )  # fmt: skip
            now = tl.maximum(largest, tl.max(scores, 1) * factor)
            # A query that has seen nothing yet: not inf - inf.
            base = tl.where(now == float("-inf"), 0.0, now)
            weights = tl.exp2(scores * factor - base[:, None])
            shrink = tl.exp2(largest - base)
            total = total * shrink + tl.sum(weights, 1)
            if HAS_DROPOUT:
                kept = kept_kernel(rows, columns, S, T, first_head + head, number, key, threshold, False)
                weights = tl.where(kept, weights * kept_scale, 0.0)
            v = load_tile(v_ptr, column, T, v_stride_t, sample, group, N, K, KP, TMA)
            mixed = mixed * shrink[:, None]
            mixed = tl.dot(weights.to(v.dtype), v, mixed, input_precision=PRECISION)
            largest = now
    empty = total == 0.0
    mixed = mixed / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (largest + tl.log2(total)) / LOG2_E)
    tl.store(lse_ptr + (sample.to(tl.int64) * H + head) * S + rows, lse, mask=rows < S)
    inner = tl.arange(0, KP)
    at = ((rows.to(tl.int64) * num_samples + sample) * H + head)[:, None] * K + inner[None, :]
    tl.store(out_ptr + at, mixed.to(q.dtype), mask=(rows < S)[:, None] & (inner < K)[None, :])


@triton.jit
def delta_kernel(dout_ptr, out_ptr, delta_ptr, S, B, H, K: tl.constexpr, KP: tl.constexpr, M: tl.constexpr):
    """dout . out of each query and head, [B, H, S] float32."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    sample, head = tl.program_id(1) // H, tl.program_id(1) % H
    offset = (sample * H + head).to(tl.int64) * K
    dout = load_rows(dout_ptr + offset, rows, S, B * H * K, K, KP)
    out = load_rows(out_ptr + offset, rows, S, B * H * K, K, KP)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + (sample.to(tl.int64) * H + head) * S + rows, delta, mask=rows < S)


@triton.jit(do_not_specialize=UNSPECIALISED)
def query_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dq_ptr, documents_ptr, slopes_ptr, samples_ptr,
    q_stride_s, q_stride_b, q_stride_h, k_stride_t, k_stride_b, k_stride_g, v_stride_t, v_stride_b, v_stride_g,
    document_stride, S, T, H, repeats, scale, scale_log2, first_head, key, threshold, kept_scale,
    K: tl.constexpr, KP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dQ of one block of M queries of one head. dout and dq are contiguous [S, B, H, K]."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, head = tl.program_id(1) // H, tl.program_id(1) % H
    num_samples = tl.num_programs(1) // H
    group = head // repeats
    rows = block * M + tl.arange(0, M)
    if TMA == 0:
        q_ptr += sample.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
        k_ptr += sample.to(tl.int64) * k_stride_b + group.to(tl.int64) * k_stride_g
        v_ptr += sample.to(tl.int64) * v_stride_b + group.to(tl.int64) * v_stride_g
        dout_ptr += (sample * H + head).to(tl.int64) * K
    documents_ptr += sample
    q = load_tile(q_ptr, block * M, S, q_stride_s, sample, head, M, K, KP, TMA)
    dout = load_tile(dout_ptr, block * M, S, num_samples * H * K, sample, head, M, K, KP, TMA)
    at = (sample.to(tl.int64) * H + head) * S + rows
    lse = tl.load(lse_ptr + at, mask=rows < S, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse) * LOG2_E
    delta = tl.load(delta_ptr + at, mask=rows < S, other=0.0)
    slope = tl.load(slopes_ptr + head) * LOG2_E if HAS_SLOPES else 0.0
    number = tl.load(samples_ptr + sample) if HAS_DROPOUT else tl.zeros([], tl.int64)
    begin, end = 0, T
    first_place = block * M + T - S
    if CAUSAL:
        end = tl.minimum(T, tl.maximum(0, first_place + M))
    if WINDOW > 0:
        begin = tl.maximum(0, first_place - WINDOW + 1) // N * N
        if not CAUSAL:
            end = tl.minimum(T, tl.maximum(0, first_place + M + WINDOW - 1))
    whole = begin
    if WINDOW == 0 and not HAS_DOCUMENTS:
        whole = T // N * N
        if CAUSAL:
            whole = tl.minimum(whole, tl.maximum(0, first_place + 1) // N * N)
    dq = tl.zeros([M, KP], tl.float32)
    ONLY_MASKED: tl.constexpr = WINDOW > 0 or HAS_DOCUMENTS
    for MASKED in tl.static_range(1 if ONLY_MASKED else 0, 2):
        start, stop = (whole, end) if MASKED else (begin, whole)
        for column in range(start, stop, N):
            columns = column + tl.arange(0, N)
            k = load_tile(k_ptr, column, T, k_stride_t, sample, group, N, K, KP, TMA)
            v = load_tile(v_ptr, column, T, v_stride_t, sample, group, N, K, KP, TMA)
            scores = scores_kernel(
                q, tl.trans(k), rows, columns, S, T, scale_log2, slope, documents_ptr, document_stride, CAUSAL, WINDOW,
                HAS_DOCUMENTS, HAS_SLOPES, MASKED, False, PRECISION,
            )  # fmt: skip
            weights = tl.exp2(scores - lse[:, None])
            dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            if HAS_DROPOUT:
                kept = kept_kernel(rows, columns, S, T, first_head + head, number, key, threshold, False)
                dweights = tl.where(kept, dweights * kept_scale, 0.0)
            dscores = weights * (dweights - delta[:, None])
            dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    inner = tl.arange(0, KP)
    at = ((rows.to(tl.int64) * num_samples + sample) * H + head)[:, None] * K + inner[None, :]
    tl.store(dq_ptr + at, (dq * scale).to(q.dtype), mask=(rows < S)[:, None] & (inner < K)[None, :])


@triton.jit(do_not_specialize=UNSPECIALISED)
def key_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, documents_ptr, slopes_ptr, samples_ptr,
    q_stride_s, q_stride_b, q_stride_h, k_stride_t, k_stride_b, k_stride_g, v_stride_t, v_stride_b, v_stride_g,
    document_stride, S, T, H, repeats, scale, scale_log2, first_head, key, threshold, kept_scale,
    K: tl.constexpr, KP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of N keys of one group, over the queries of all its heads. dk and dv are contiguous [T, B, G, K]."""
    G = H // repeats
    sample, group = tl.program_id(1) // G, tl.program_id(1) % G
    num_samples = tl.num_programs(1) // G
    first_column = tl.program_id(0) * N
    columns = first_column + tl.arange(0, N)
    if TMA == 0:
        k_ptr += sample.to(tl.int64) * k_stride_b + group.to(tl.int64) * k_stride_g
        v_ptr += sample.to(tl.int64) * v_stride_b + group.to(tl.int64) * v_stride_g
    documents_ptr += sample
    k = load_tile(k_ptr, first_column, T, k_stride_t, sample, group, N, K, KP, TMA)
    v = load_tile(v_ptr, first_column, T, v_stride_t, sample, group, N, K, KP, TMA)
    number = tl.load(samples_ptr + sample) if HAS_DROPOUT else tl.zeros([], tl.int64)
    begin, end = 0, S
    first_place = first_column - (T - S)
    if CAUSAL:
        begin = tl.maximum(0, first_place) // M * M
    if WINDOW > 0:
        end = tl.minimum(S, tl.maximum(0, first_place + N + WINDOW - 1))
        if not CAUSAL:
            begin = tl.maximum(0, first_place - WINDOW + 1) // M * M
    # From here on all queries see all of these keys. Queries past the last count for nothing: their dout, delta and lse are 0.
    whole = end
    if WINDOW == 0 and not HAS_DOCUMENTS:
        whole = tl.minimum(end, tl.cdiv(tl.maximum(0, first_place + N - 1), M) * M) if CAUSAL else begin
    FIRST: tl.constexpr = 0 if CAUSAL or WINDOW > 0 or HAS_DOCUMENTS else 1
    LAST: tl.constexpr = 1 if WINDOW > 0 or HAS_DOCUMENTS else 2
    dk = tl.zeros([N, KP], tl.float32)
    dv = tl.zeros([N, KP], tl.float32)
    for turn in range(repeats):
        head = group * repeats + turn
        slope = tl.load(slopes_ptr + head) * LOG2_E if HAS_SLOPES else 0.0
        if TMA == 0:
            q_of_head = q_ptr + sample.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
            dout_of_head = dout_ptr + (sample * H + head).to(tl.int64) * K
        else:
            q_of_head = q_ptr
            dout_of_head = dout_ptr
        first = (sample.to(tl.int64) * H + head) * S
        for PART in tl.static_range(FIRST, LAST):
            start, stop = (begin, whole) if PART == 0 else (whole, end)
            for row in range(start, stop, M):
                rows = row + tl.arange(0, M)
                q = load_tile(q_of_head, row, S, q_stride_s, sample, head, M, K, KP, TMA)
                dout = load_tile(dout_of_head, row, S, num_samples * H * K, sample, head, M, K, KP, TMA)
                lse = tl.load(lse_ptr + first + rows, mask=rows < S, other=0.0)
                lse = tl.where(lse == float("-inf"), 0.0, lse) * LOG2_E
                delta = tl.load(delta_ptr + first + rows, mask=rows < S, other=0.0)
                # Keys by queries: what multiplies dout and q is then used as it was made, without turning it.
                scores = scores_kernel(
                    k, tl.trans(q), rows, columns, S, T, scale_log2, slope, documents_ptr, document_stride, CAUSAL, WINDOW,
                    HAS_DOCUMENTS, HAS_SLOPES, PART == 0, True, PRECISION,
                )  # fmt: skip
                weights = tl.exp2(scores - lse[None, :])
                dropped = weights
                if HAS_DROPOUT:
                    kept = kept_kernel(rows, columns, S, T, first_head + head, number, key, threshold, True)
                    dropped = tl.where(kept, weights * kept_scale, 0.0)
                dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision=PRECISION)
                dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
                if HAS_DROPOUT:
                    dweights = tl.where(kept, dweights * kept_scale, 0.0)
                dscores = weights * (dweights - delta[None, :])
                dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    inner = tl.arange(0, KP)
    at = ((columns.to(tl.int64) * num_samples + sample) * G + group)[:, None] * K + inner[None, :]
    mask = (columns < T)[:, None] & (inner < K)[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(k.dtype), mask=mask)
    tl.store(dv_ptr + at, dv.to(k.dtype), mask=mask)


def refuses(query: Tensor, key: Tensor, value: Tensor, masks: Masks) -> str | None:
    """Why these kernels do not take such inputs; None: they do."""
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {query.dtype} (float16, bfloat16 and float32 only)"
    if query.shape[-1] not in HEAD_SIZES:
        return f"head size {query.shape[-1]} (multiples of 8 up to 256 only)"
    if architecture() in NARROW and query.shape[-1] > LARGEST_NARROW:
        # 106,496 in forward and 131,072 in backward, of the cuts for sm_80.
        return (
            f"head size {query.shape[-1]} on sm_{architecture()}, whose blocks have 101376 bytes of shared memory (131072 needed)"
        )
    if any(x.stride(-1) != 1 for x in (query, key, value)):
        return "a head whose elements are not side by side"
    if query.shape[1] * query.shape[2] > MOST_HEADS:
        return f"{query.shape[1]} samples of {query.shape[2]} heads (a product of at most {MOST_HEADS})"
    if masks.documents_TB is not None and query.shape[0] != key.shape[0]:
        return "documents with another number of queries than of keys"
    return None


def _common(query: Tensor, key: Tensor, value: Tensor, masks: Masks) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments, compile-time flags) of every kernel here but `delta_kernel`."""
    S, _, H, K = query.shape
    T, _, G, _ = key.shape
    names = (("q", "s", query, "b", "h"), ("k", "t", key, "b", "g"), ("v", "t", value, "b", "g"))
    strides = {
        f"{name}_stride_{axis}": x.stride(dim)
        for name, first, x, second, third in names
        for dim, axis in enumerate((first, second, third))
    }
    documents, slopes, samples = masks.documents_TB, masks.slopes_H, masks.samples_B
    arguments = {
        **strides,
        "documents_ptr": key if documents is None else documents,
        "slopes_ptr": key if slopes is None else slopes,
        "samples_ptr": key if samples is None else samples,
        "document_stride": 0 if documents is None else documents.stride(0),
        "S": S,
        "T": T,
        "H": H,
        "repeats": H // G,
        "first_head": masks.first_head,
        "key": masks.key,
        "threshold": round(masks.rate * 2.0**32),
        "kept_scale": 1.0 / (1.0 - masks.rate),
    }
    return arguments, _flags(K, query.dtype, masks)


def _flags(K: int, dtype: torch.dtype, masks: Masks) -> dict[str, Any]:
    return {
        "K": K,
        "KP": max(16, triton.next_power_of_2(K)),
        "CAUSAL": masks.causal,
        "WINDOW": masks.window,
        "HAS_DOCUMENTS": masks.documents_TB is not None,
        "HAS_SLOPES": masks.slopes_H is not None,
        "HAS_DROPOUT": masks.samples_B is not None,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def forward(query_SBHK: Tensor, key_TBGK: Tensor, value_TBGK: Tensor, masks: Masks, scale: float) -> tuple[Tensor, Tensor]:
    """(output [S, B, H, K], log-sum-exp of the scaled scores [B, H, S] float32). A query that sees nothing gets 0 and -inf."""
    tile = tiles_for(query_SBHK.shape[-1], query_SBHK.dtype, masks=masks, architecture=architecture()).forward
    given = (query_SBHK, key_TBGK, value_TBGK)
    return launch_forward(given, *given, masks, scale, tile=tile, tma=0)


def launch_forward(
    sources: tuple[Any, Any, Any], query: Tensor, key: Tensor, value: Tensor, masks: Masks, scale: float, *, tile: Tile, tma: int
) -> tuple[Tensor, Tensor]:
    """`forward`, reading Q, K and V from `sources`: the tensors or descriptors of them, as `tma` says (see `forward_kernel`)."""
    S, B, H, K = query.shape
    out = query.new_empty((S, B, H, K))
    lse = query.new_empty((B, H, S), dtype=torch.float32)
    arguments, flags = _common(query, key, value, masks)
    grid = (triton.cdiv(S, tile.queries), B * H)
    forward_kernel[grid](
        *sources, out, lse, scale_log2=scale * LOG2_E.value, M=tile.queries, N=tile.keys, TMA=tma,
        SCALE_LATE=scales_late(masks, scale), num_warps=tile.warps, num_stages=tile.stages, **arguments, **flags,
    )  # fmt: skip
    return out, lse


def scales_late(masks: Masks, scale: float) -> bool:
    """The largest score is that of the largest product, and nothing is added to scaled scores."""
    return scale > 0 and masks.slopes_H is None


def backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, masks: Masks, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dquery, dkey, dvalue), contiguous, of contiguous dout and out."""
    tiles = tiles_for(query.shape[-1], query.dtype, masks=masks, architecture=architecture())
    return launch_backward(
        lambda tile: (dout, query, key, value), dout, query, key, value, out, lse, masks, scale, tiles=tiles, tma=0
    )


def launch_backward(
    sources: Callable[[Tile], tuple[Any, Any, Any, Any]], dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor,
    lse: Tensor, masks: Masks, scale: float, *, tiles: Tiles, tma: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`backward`, reading dO, Q, K and V from what `sources` gives for a kernel's tile: the tensors, or descriptors of them."""
    S, B, H, K = query.shape
    T, _, G, _ = key.shape
    dq, dk, dv = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    delta = torch.empty_like(lse)
    arguments, flags = _common(query, key, value, masks)
    arguments |= {"scale": scale, "scale_log2": scale * LOG2_E.value}
    delta_kernel[(triton.cdiv(S, 64), B * H)](dout, out, delta, S, B, H, K=K, KP=flags["KP"], M=64)
    tile = tiles.dquery
    query_kernel[(triton.cdiv(S, tile.queries), B * H)](
        *sources(tile), lse, delta, dq, M=tile.queries, N=tile.keys, TMA=tma, num_warps=tile.warps, num_stages=tile.stages,
        **arguments, **flags,
    )  # fmt: skip
    tile = tiles.dkey
    key_kernel[(triton.cdiv(T, tile.keys), B * G)](
        *sources(tile), lse, delta, dk, dv, M=tile.queries, N=tile.keys, TMA=tma, num_warps=tile.warps, num_stages=tile.stages,
        **arguments, **flags,
    )  # fmt: skip
    return dq, dk, dv


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """Of the three large kernels, in 16 bits."""

    forward: Tile
    dquery: Tile
    dkey: Tile


_FLOAT32 = Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
_WIDE_FORWARD, _WIDE_DQUERY, _WIDE_DKEY = Tile(64, 64, 8, 2), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)
_TILES: dict[int, dict[int, Tiles]] = {
    80: {
        64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
        128: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        256: Tiles(_WIDE_FORWARD, _WIDE_DQUERY, _WIDE_DKEY),
    },
    90: {
        64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
        # Forward: with 8 warps Triton's tutorial 06 measures no smaller tile on Hopper.
        128: Tiles(Tile(128, 128, 8, 2), Tile(64, 64, 8, 2), Tile(32, 128, 8, 2)),
        256: Tiles(Tile(128, 64, 8, 2), Tile(128, 16, 8, 1), _WIDE_DKEY),
    },
    100: {
        64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
        128: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 128, 8, 1)),
        256: Tiles(_WIDE_FORWARD, _WIDE_DQUERY, _WIDE_DKEY),
    },
}
_MASKED = Tiles(Tile(128, 32, 8, 3), Tile(64, 32, 8, 2), Tile(32, 64, 8, 1))
"""Where dropout draws bits beside the scores: its Philox takes registers of its own."""


def tiles_for(K: int, dtype: torch.dtype, *, masks: Masks, architecture: int) -> Tiles:
    """The largest cuts that neither spill registers nor leave shared memory (`ahead` holds it), by padded head size, dtype and
    architecture (80, 90, 100; the next lower of others, 80 of NARROW)."""
    padded = max(16, triton.next_power_of_2(K))
    if dtype == torch.float32:
        return _FLOAT32
    if masks.samples_B is not None and padded <= 128:
        return _MASKED
    known = 80 if architecture in NARROW else max((a for a in _TILES if a <= architecture), default=80)
    return _TILES[known][max(64, padded)]


def ahead() -> Iterator[Ahead]:
    """The core case (causal, bfloat16) by head size, and all of the masks at once."""
    plain, all_masks = Masks(), Masks(documents_TB=torch.empty(0), slopes_H=torch.empty(0), samples_B=torch.empty(0))
    for K, masks in [(64, plain), (128, plain), (256, plain), (128, all_masks)]:
        case = f"attention K{K}{' all masks' if masks is all_masks else ''}"
        tiles = {a: tiles_for(K, torch.bfloat16, masks=masks, architecture=a) for a in _TILES}
        for name, kernel in KERNELS.items():
            by_tile: dict[Tile, list[int]] = {}
            for a, of_architecture in tiles.items():
                by_tile.setdefault(getattr(of_architecture, name), []).append(a)
            for tile, architectures in by_tile.items():
                yield specialisation(f"{case} {name}", kernel, K, masks, tile, architectures=tuple(architectures))


KERNELS = {"forward": forward_kernel, "dquery": query_kernel, "dkey": key_kernel}
"""By the names of `Tiles`."""


def specialisation(
    name: str, kernel: Any, K: int, masks: Masks, tile: Tile, *, architectures: tuple[int, ...], tma: int = 0, **types: str
) -> Ahead:
    """A kernel of KERNELS on bfloat16, as a launch with a positive scale and such masks would specialise it."""
    types |= dict.fromkeys(("lse_ptr", "delta_ptr", "slopes_ptr"), "*fp32:16")
    types |= dict.fromkeys(("documents_ptr", "samples_ptr"), "*i64:16")
    types |= dict.fromkeys(("scale", "scale_log2", "kept_scale"), "fp32") | dict.fromkeys(("key", "threshold"), "i64")
    types |= dict.fromkeys(("S", "T"), "i32:16")
    parameters = [p.name for p in kernel.params]
    types |= {p: "i32:16" for p in parameters if "_stride_" in p}
    given = signature(kernel, "bf16", **{p: t for p, t in types.items() if p in parameters})
    constants = {**_flags(K, torch.bfloat16, masks), "M": tile.queries, "N": tile.keys, "TMA": tma}
    if "SCALE_LATE" in parameters:
        constants["SCALE_LATE"] = scales_late(masks, 1.0)
    needs = () if tma == 0 else ("tma", "warp-specialised") if kernel is forward_kernel else ("tma",)
    # With offsets of heads in 64 bits: two registers above the bound; the other cuts tried spill more.
    spills = {90: 40} if kernel is query_kernel and K > 128 else {}
    return Ahead(name, kernel, given, constants, tile.warps, tile.stages, spills, architectures, needs)
