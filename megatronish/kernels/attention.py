"""Causal attention with grouped key/value heads: softmax(Q K^T / sqrt(K)) V; no S x S tensor where a flash kernel exists."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatronish.kernels import peers
from megatronish.kernels.attention_bodies import triton_bodies
from megatronish.kernels.cuda import attention as cuda_attention
from megatronish.kernels.registry import Implementation, accumulate_dtype, register


def reference(query_SBHK: Tensor, key_SBGK: Tensor, value_SBGK: Tensor) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: (output [S, B, H, K], log-sum-exp of the scaled scores [B, H, S] in the accumulation dtype)."""
    wide = accumulate_dtype(query_SBHK)
    S, repeats = query_SBHK.shape[0], query_SBHK.shape[2] // key_SBGK.shape[2]
    key = key_SBGK.to(wide).repeat_interleave(repeats, 2)
    value = value_SBGK.to(wide).repeat_interleave(repeats, 2)
    scores_BHST = torch.einsum("sbhk,tbhk->bhst", query_SBHK.to(wide), key) / math.sqrt(query_SBHK.shape[-1])
    future = torch.ones(S, S, dtype=torch.bool, device=query_SBHK.device).triu(1)
    scores_BHST = scores_BHST.masked_fill(future, -math.inf)
    out = torch.einsum("bhst,tbhk->sbhk", scores_BHST.softmax(-1), value)
    return out.to(query_SBHK.dtype), scores_BHST.logsumexp(-1)


def _reference_backward(dout: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        out, _ = reference(*inputs)
    dq, dk, dv = torch.autograd.grad(out, inputs, dout)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _as_heads(x_SBHK: Tensor, num_heads: int) -> Tensor:
    """[S, B, G, K] -> a [B, H, S, K] tensor; a view where G = H, else each group's head repeated."""
    if x_SBHK.shape[2] != num_heads:
        x_SBHK = x_SBHK.repeat_interleave(num_heads // x_SBHK.shape[2], 2)
    return x_SBHK.permute(1, 2, 0, 3)


def _uses_flash_on_gpu(query: Tensor) -> bool:
    return query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16)


def _forward(query_SBHK: Tensor, key_SBGK: Tensor, value_SBGK: Tensor) -> tuple[Tensor, Tensor]:
    H = query_SBHK.shape[2]
    q, k, v = query_SBHK.permute(1, 2, 0, 3), _as_heads(key_SBGK, H), _as_heads(value_SBGK, H)
    if query_SBHK.device.type == "cpu":
        out_BHSK, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    elif _uses_flash_on_gpu(query_SBHK):
        out_BHSK, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False)
    else:
        return reference(query_SBHK, key_SBGK, value_SBGK)
    return out_BHSK.permute(2, 0, 1, 3).contiguous(), lse.to(accumulate_dtype(query_SBHK)).contiguous()


def _forward_fake(query_SBHK: Tensor, key_SBGK: Tensor, value_SBGK: Tensor) -> tuple[Tensor, Tensor]:
    S, B, H, _ = query_SBHK.shape
    return query_SBHK.new_empty(query_SBHK.shape), query_SBHK.new_empty((B, H, S), dtype=accumulate_dtype(query_SBHK))


def _backward(dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    S, B, H, K = query.shape
    G = key.shape[2]
    views = [x.permute(1, 2, 0, 3) for x in (dout, query)] + [_as_heads(key, H), _as_heads(value, H), out.permute(1, 2, 0, 3)]
    if query.device.type == "cpu":
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*views, lse, 0.0, True)
    elif _uses_flash_on_gpu(query):
        # Without dropout the kernel never reads its Philox state.
        state = torch.empty(0, dtype=torch.int64, device=query.device)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(*views, lse, None, None, S, S, 0.0, True, state, state)
    else:
        return _reference_backward(dout, query, key, value)
    dq, dk, dv = (g.permute(2, 0, 1, 3) for g in grads)
    if G != H:
        dk, dv = (g.unflatten(2, (G, H // G)).sum(3) for g in (dk, dv))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _backward_fake(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _reference_forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = reference(query, key, value)
    return out.contiguous(), lse.contiguous()


def _whole_reference_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _reference_backward(dout, query, key, value)


def _triton_masks(query: Tensor) -> tuple[Any, float]:
    from megatronish.kernels.triton.attention import Masks

    return Masks(), 1.0 / math.sqrt(query.shape[-1])


_forward_op = register(
    "attention(Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    also={
        "reference": Implementation(_reference_forward),
        **triton_bodies(_triton_masks, backward=False),
        "cuda": Implementation(cuda_attention.forward, cuda_attention.refuses),
        **peers.ATTENTION,
    },
)
_backward_op = register(
    "attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    also={
        "reference": Implementation(_whole_reference_backward),
        **triton_bodies(_triton_masks, backward=True),
        "cuda": Implementation(cuda_attention.backward, cuda_attention.refuses_backward),
        **peers.ATTENTION_BACKWARD,
    },
    choice="attention",
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, lse = _forward_op(query, key, value)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _backward_op(dout, *ctx.saved_tensors)


def attention(query_SBHK: Tensor, key_SBGK: Tensor, value_SBGK: Tensor) -> Tensor:
    """Causal attention over S: query [S, B, H, K], key and value [S, B, G, K] with H a multiple of G -> [S, B, H, K].

    Query head h attends with key/value head h // (H / G). Saves its inputs, its output and the log-sum-exp [B, H, S]."""
    out: Tensor = _Attention.apply(query_SBHK, key_SBGK, value_SBGK)
    return out


def sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Inputs that tests and benches run every implementation on."""
    generator = torch.Generator(device).manual_seed(0)
    cases = []
    sizes = [(16, 2, 4, 4, 8), (33, 1, 4, 2, 16), (1, 2, 2, 1, 32), (5, 1, 2, 1, 64), (3, 1, 1, 1, 128)]
    if device != "cpu":
        # Some bodies take these head sizes only, and go through their stages of loads several times.
        sizes += [(777, 1, 4, 2, 64), (777, 1, 4, 2, 128)]
    for S, B, H, G, K in sizes:
        shapes = [(S, B, H, K), (S, B, G, K), (S, B, G, K)]
        q, k, v = (torch.randn(*s, generator=generator, dtype=dtype, device=device) for s in shapes)
        cases.append((q, k, v))
    return cases
