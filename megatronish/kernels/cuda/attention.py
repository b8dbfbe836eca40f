"""Causal attention on the tensor cores, head sizes 64 and 128, float16 and bfloat16: csrc/cuda/attention.cu.

Deterministic: dQ is made in a pass of its own, dK and dV over all heads of a group in another; no atomics."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatronish.kernels.cuda.launch import DTYPES, dense, is_misaligned, module, shared_memory_of, stream_of, unavailable

HEAD_SIZES = (64, 128)


def shared_bytes(K: int) -> int:
    """Of backward's blocks, which take more than forward's: `Backward<K>::kShared` of csrc/cuda/attention.cu."""
    kept, passing = 128, 64
    return (2 * kept + 4 * passing) * K * 2 + 4 * passing * 4


def refuses(query_SBHK: Tensor, key_SBGK: Tensor, value_SBGK: Tensor) -> str | None:
    """Why these kernels do not take such inputs; None: they do."""
    missing = unavailable(query_SBHK)
    if missing is not None:
        return missing
    if query_SBHK.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {query_SBHK.dtype} (float16 and bfloat16 only)"
    S, B, H, K = query_SBHK.shape
    if K not in HEAD_SIZES:
        return f"head size {K} (64 and 128 only)"
    if shared_bytes(K) > (allowed := shared_memory_of(query_SBHK)):
        return f"head size {K} on a device with {allowed} bytes of shared memory a block (backward takes {shared_bytes(K)})"
    if key_SBGK.shape[0] != S:
        return f"{S} queries with {key_SBGK.shape[0]} keys (as many of each only)"
    if B >= 2**16 or H >= 2**16 or S * B * H >= 2**31:
        return "2^16 or more samples or heads, or 2^31 or more queries"
    if any(is_misaligned(x) for x in (query_SBHK, key_SBGK, value_SBGK)):
        return "an input whose address or strides are not multiples of 16 bytes"
    return None


def refuses_backward(dout: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> str | None:
    """`refuses`, of the backward op's arguments."""
    return refuses(query, key, value)


def _common(query: Tensor, key: Tensor, value: Tensor) -> tuple[object, ...]:
    S, B, H, K = query.shape
    inputs = (query, key, value)
    strides = [list(x.stride()[:3]) for x in inputs]
    return DTYPES[query.dtype], [S, B, H, key.shape[2], K], [x.data_ptr() for x in inputs], strides


def forward(query_SBHK: Tensor, key_SBGK: Tensor, value_SBGK: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """(output [S, B, H, K], log-sum-exp of the scaled scores [B, H, S] float32). `scale`: positive; None is 1 / sqrt(K)."""
    S, B, H, K = query_SBHK.shape
    out = query_SBHK.new_empty((S, B, H, K))
    lse = query_SBHK.new_empty((B, H, S), dtype=torch.float32)
    if out.numel():
        module().attention_forward(
            *_common(query_SBHK, key_SBGK, value_SBGK),
            out.data_ptr(),
            lse.data_ptr(),
            scale=1 / math.sqrt(K) if scale is None else scale,
            stream=stream_of(out),
        )
    return out, lse


def backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dquery, dkey, dvalue), contiguous. `out` and `lse` are forward's."""
    dout, out, lse = dense(dout), dense(out), lse.contiguous()
    dq, dk, dv = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    delta = torch.empty_like(lse)
    if out.numel():
        results = [x.data_ptr() for x in (dout, out, lse, delta, dq, dk, dv)]
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        module().attention_backward(*_common(query, key, value), *results, scale=scale, stream=stream_of(out))
    return dq, dk, dv
