"""Attention of new tokens over cached keys and values, each sample up to its own position; forward only, for generation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatronish.kernels.registry import accumulate_dtype, register


def reference(query_SBHK: Tensor, key_BGTK: Tensor, value_BGTK: Tensor, positions_SB: Tensor) -> Tensor:
    """Plain PyTorch."""
    wide = accumulate_dtype(query_SBHK)
    repeats = query_SBHK.shape[2] // key_BGTK.shape[1]
    key, value = (x.to(wide).repeat_interleave(repeats, 1) for x in (key_BGTK, value_BGTK))
    scores_BHST = torch.einsum("sbhk,bhtk->bhst", query_SBHK.to(wide), key) / math.sqrt(query_SBHK.shape[-1])
    rows_T = torch.arange(key.shape[2], device=key.device)
    scores_BHST = scores_BHST.masked_fill(rows_T > positions_SB.t()[:, None, :, None], -math.inf)
    return torch.einsum("bhst,bhtk->sbhk", scores_BHST.softmax(-1), value).to(query_SBHK.dtype)


def _forward(query_SBHK: Tensor, key_BGTK: Tensor, value_BGTK: Tensor, positions_SB: Tensor) -> Tensor:
    S, B, H, K = query_SBHK.shape
    G, T = key_BGTK.shape[1:3]
    # The queries of a group stand in line with those of other tokens, so that its keys need not be repeated.
    query_BGqK = query_SBHK.view(S, B, G, H // G, K).permute(1, 2, 0, 3, 4).reshape(B, G, S * (H // G), K)
    rows_T = torch.arange(T, device=key_BGTK.device)
    seen_BqT = (rows_T <= positions_SB.t()[..., None]).repeat_interleave(H // G, 1)
    out = torch.nn.functional.scaled_dot_product_attention(query_BGqK, key_BGTK, value_BGTK, attn_mask=seen_BqT[:, None])
    return out.view(B, G, S, H // G, K).permute(2, 0, 1, 3, 4).reshape(S, B, H, K)


def _forward_fake(query_SBHK: Tensor, key_BGTK: Tensor, value_BGTK: Tensor, positions_SB: Tensor) -> Tensor:
    return query_SBHK.new_empty(query_SBHK.shape)


cached_attention = register(
    "cached_attention(Tensor query, Tensor key, Tensor value, Tensor positions) -> Tensor", _forward, _forward_fake
)
"""query [S, B, H, K] of tokens at positions int64 [S, B]; keys and values [B, G, T, K], row t of position t -> [S, B, H, K].

A token sees rows 0 .. its position, which must be below T. Without autograd."""


def sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Inputs that tests and benches run every implementation on."""
    generator = torch.Generator(device).manual_seed(0)
    cases = []
    for S, B, H, G, K, T in [(1, 3, 4, 2, 8, 9), (5, 2, 6, 2, 16, 33), (1, 1, 2, 2, 32, 1)]:
        shapes = [(S, B, H, K), (B, G, T, K), (B, G, T, K)]
        q, k, v = (torch.randn(*s, generator=generator, dtype=dtype, device=device) for s in shapes)
        cases.append((q, k, v, torch.randint(T, (S, B), generator=generator, device=device)))
    return cases
