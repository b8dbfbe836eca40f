"""Rotary position embedding (Su et al. 2021), fused with the split of a packed QKV projection.

The first R elements of a head turn, pair by pair; the others stay. Half layout: element k < R/2 turns with element k + R/2, as in
Hugging Face's Llama. Interleaved: 2k with 2k + 1, as in the paper and in Meta's own checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from megatronish.kernels.installed import refuses_triton_of_float32
from megatronish.kernels.registry import Implementation, register
from megatronish.kernels.rotary_tables import rotary_tables

Layout = Literal["half", "interleaved"]


def rotate(x_SBHK: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Plain PyTorch: rotate the first R elements of every head of x by the tables; any dtype, computed in the tables' dtype."""
    R = 2 * cos.shape[-1]
    turned, rest = x_SBHK[..., :R].to(cos.dtype), x_SBHK[..., R:]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    out = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((out.to(x_SBHK.dtype), rest), -1)


def reference(qkv_SBGqK: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch: [S, B, G, q + 2, K] -> rotated queries [S, B, G*q, K], rotated keys and plain values [S, B, G, K]."""
    q = qkv_SBGqK.shape[3] - 2
    query, key = qkv_SBGqK[..., :q, :].flatten(2, 3), qkv_SBGqK[..., q, :]
    return rotate(query, cos, sin, interleaved), rotate(key, cos, sin, interleaved), qkv_SBGqK[..., q + 1, :].clone()


def _places(R: int, interleaved: bool) -> tuple[slice, slice]:
    """Of the first and of the second elements of all pairs."""
    return (slice(0, R, 2), slice(1, R, 2)) if interleaved else (slice(0, R // 2), slice(R // 2, R))


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    R = 2 * cos.shape[-1]
    one, other = _places(R, interleaved)
    first, second = x[..., one].to(cos.dtype), x[..., other].to(cos.dtype)
    out[..., one] = torch.addcmul(first * cos, second, sin, value=-1)
    out[..., other] = torch.addcmul(second * cos, first, sin)
    if x.shape[-1] > R:
        out[..., R:] = x[..., R:]


def _forward(qkv_SBGqK: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = _forward_fake(qkv_SBGqK, cos, sin, interleaved)
    q = qkv_SBGqK.shape[3] - 2
    _rotate_into(query.unflatten(2, (-1, q)), qkv_SBGqK[..., :q, :], cos.unsqueeze(3), sin.unsqueeze(3), interleaved)
    _rotate_into(key, qkv_SBGqK[..., q, :], cos, sin, interleaved)
    value.copy_(qkv_SBGqK[..., q + 1, :])
    return query, key, value


def _forward_fake(qkv_SBGqK: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    S, B, G, q_and_2, K = qkv_SBGqK.shape
    query = qkv_SBGqK.new_empty(S, B, G * (q_and_2 - 2), K)
    return query, qkv_SBGqK.new_empty(S, B, G, K), qkv_SBGqK.new_empty(S, B, G, K)


def _backward(dq_SBHK: Tensor, dk_SBGK: Tensor, dv_SBGK: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    dqkv = _backward_fake(dq_SBHK, dk_SBGK, dv_SBGK, cos, sin, interleaved)
    q = dqkv.shape[3] - 2
    # A rotation's transpose is the rotation by the opposite angle.
    _rotate_into(dqkv[..., :q, :], dq_SBHK.unflatten(2, (-1, q)), cos.unsqueeze(3), -sin.unsqueeze(3), interleaved)
    _rotate_into(dqkv[..., q, :], dk_SBGK, cos, -sin, interleaved)
    dqkv[..., q + 1, :] = dv_SBGK
    return dqkv


def _backward_fake(dq_SBHK: Tensor, dk_SBGK: Tensor, dv_SBGK: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    S, B, G, K = dk_SBGK.shape
    return dq_SBHK.new_empty(S, B, G, dq_SBHK.shape[2] // G + 2, K)


def _triton_forward(qkv_SBGqK: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    from megatronish.kernels.triton import rotary

    return rotary.forward(qkv_SBGqK, cos, sin, interleaved)


def _triton_backward(dq_SBHK: Tensor, dk_SBGK: Tensor, dv_SBGK: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    from megatronish.kernels.triton import rotary

    return rotary.backward(dq_SBHK, dk_SBGK, dv_SBGK, cos, sin, interleaved)


def _refuses_triton(x: Tensor, *others: Any) -> str | None:
    return refuses_triton_of_float32(x)


_forward_op = register(
    "split_rotary(Tensor qkv, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    also={"triton": Implementation(_triton_forward, _refuses_triton)},
)


def _by_packed(dq_SBHK: Tensor, dk_SBGK: Tensor, *others: Any) -> tuple[Sequence[int], torch.dtype, str]:
    S, B, G, K = dk_SBGK.shape
    return (S, B, G, dq_SBHK.shape[2] // G + 2, K), dk_SBGK.dtype, ""


_backward_op = register(
    "split_rotary_backward(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    _backward,
    _backward_fake,
    also={"triton": Implementation(_triton_backward, _refuses_triton)},
    choice="split_rotary",
    keyed_by=_by_packed,
)


class _SplitRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_SBGqK: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _forward_op(qkv_SBGqK, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None, None]:
        return _backward_op(dq, dk, dv, *ctx.saved_tensors, ctx.interleaved), None, None, None


def split_rotary(qkv_SBGqK: Tensor, cos: Tensor, sin: Tensor, *, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Split packed projections and rotate queries and keys: [S, B, G, q + 2, K] -> q [S, B, G*q, K], k, v [S, B, G, K], contiguous.

    Group g of the packed tensor holds its q queries, then its key, then its value. cos, sin [S, B, 1, R/2] from `rotary_tables`:
    the first R of a head's K elements turn. Saves only the tables."""
    out: tuple[Tensor, Tensor, Tensor] = _SplitRotary.apply(qkv_SBGqK, cos, sin, layout == "interleaved")
    return out


def sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Tensor, Tensor, Tensor, bool]]:
    """Inputs that tests and benches run every implementation on: whole and part of a head, in both layouts."""
    generator = torch.Generator(device).manual_seed(0)
    cases = []
    for S, B, G, q, K, R, interleaved in [
        (6, 2, 2, 3, 8, 8, False),
        (5, 1, 1, 1, 16, 16, True),
        (4, 2, 4, 1, 32, 12, False),
        (3, 2, 2, 1, 10, 6, True),
    ]:
        positions = torch.arange(S, device=device)[:, None].expand(S, B)
        tables = rotary_tables(positions, size=R, theta=10000.0, dtype=dtype)
        packed = torch.randn(S, B, G, q + 2, K, generator=generator, dtype=dtype, device=device)
        cases.append((packed, *tables, interleaved))
    return cases
