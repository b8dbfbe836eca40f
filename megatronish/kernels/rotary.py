"""Rotary position embedding (Su et al. 2021), half layout, fused with the split of a packed QKV projection.

Half layout: element k < K/2 of a head is rotated with element k + K/2, as in Llama checkpoints and Hugging Face transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatronish.kernels.installed import refuses_triton_of_float32
from megatronish.kernels.registry import Implementation, register


def rotary_tables(positions_SB: Tensor, *, head_size: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each [S, B, 1, K/2] in the accumulation dtype of `dtype` (float32 or float64)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, head_size, 2, dtype=wide, device=positions_SB.device) / head_size
    angle = positions_SB.to(wide)[..., None, None] * (1.0 / theta**exponent)
    return angle.cos(), angle.sin()


def rotate(x_SBHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Plain PyTorch: rotate every head of x by the tables; any dtype, computed in the tables' dtype."""
    first, second = x_SBHK.to(cos.dtype).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_SBHK.dtype)


def reference(qkv_SBGqK: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch: [S, B, G, q + 2, K] -> rotated queries [S, B, G*q, K], rotated keys and plain values [S, B, G, K]."""
    q = qkv_SBGqK.shape[3] - 2
    query = qkv_SBGqK[..., :q, :].flatten(2, 3)
    return rotate(query, cos, sin), rotate(qkv_SBGqK[..., q, :], cos, sin), qkv_SBGqK[..., q + 1, :].clone()


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    half = x.shape[-1] // 2
    first, second = x[..., :half].to(cos.dtype), x[..., half:].to(cos.dtype)
    out[..., :half] = torch.addcmul(first * cos, second, sin, value=-1)
    out[..., half:] = torch.addcmul(second * cos, first, sin)


def _forward(qkv_SBGqK: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = _forward_fake(qkv_SBGqK, cos, sin)
    q = qkv_SBGqK.shape[3] - 2
    _rotate_into(query.unflatten(2, (-1, q)), qkv_SBGqK[..., :q, :], cos.unsqueeze(3), sin.unsqueeze(3))
    _rotate_into(key, qkv_SBGqK[..., q, :], cos, sin)
    value.copy_(qkv_SBGqK[..., q + 1, :])
    return query, key, value


def _forward_fake(qkv_SBGqK: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    S, B, G, q_and_2, K = qkv_SBGqK.shape
    query = qkv_SBGqK.new_empty(S, B, G * (q_and_2 - 2), K)
    return query, qkv_SBGqK.new_empty(S, B, G, K), qkv_SBGqK.new_empty(S, B, G, K)


def _backward(dq_SBHK: Tensor, dk_SBGK: Tensor, dv_SBGK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dqkv = _backward_fake(dq_SBHK, dk_SBGK, dv_SBGK, cos, sin)
    q = dqkv.shape[3] - 2
    # A rotation's transpose is the rotation by the opposite angle.
    _rotate_into(dqkv[..., :q, :], dq_SBHK.unflatten(2, (-1, q)), cos.unsqueeze(3), -sin.unsqueeze(3))
    _rotate_into(dqkv[..., q, :], dk_SBGK, cos, -sin)
    dqkv[..., q + 1, :] = dv_SBGK
    return dqkv


def _backward_fake(dq_SBHK: Tensor, dk_SBGK: Tensor, dv_SBGK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    S, B, G, K = dk_SBGK.shape
    return dq_SBHK.new_empty(S, B, G, dq_SBHK.shape[2] // G + 2, K)


def _triton_forward(qkv_SBGqK: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from megatronish.kernels.triton import rotary

    return rotary.forward(qkv_SBGqK, cos, sin)


def _triton_backward(dq_SBHK: Tensor, dk_SBGK: Tensor, dv_SBGK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from megatronish.kernels.triton import rotary

    return rotary.backward(dq_SBHK, dk_SBGK, dv_SBGK, cos, sin)


def _refuses_triton(x: Tensor, *others: Any) -> str | None:
    return refuses_triton_of_float32(x)


_forward_op = register(
    "split_rotary(Tensor qkv, Tensor cos, Tensor sin) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    also={"triton": Implementation(_triton_forward, _refuses_triton)},
)
_backward_op = register(
    "split_rotary_backward(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin) -> Tensor",
    _backward,
    _backward_fake,
    also={"triton": Implementation(_triton_backward, _refuses_triton)},
    choice="split_rotary",
)


class _SplitRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_SBGqK: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _forward_op(qkv_SBGqK, cos, sin)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None]:
        return _backward_op(dq, dk, dv, *ctx.saved_tensors), None, None


def split_rotary(qkv_SBGqK: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split packed projections and rotate queries and keys: [S, B, G, q + 2, K] -> q [S, B, G*q, K], k, v [S, B, G, K], contiguous.

    Group g of the packed tensor holds its q queries, then its key, then its value. cos, sin from `rotary_tables`. Saves only the
    tables."""
    out: tuple[Tensor, Tensor, Tensor] = _SplitRotary.apply(qkv_SBGqK, cos, sin)
    return out


def sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Inputs that tests and benches run every implementation on."""
    generator = torch.Generator(device).manual_seed(0)
    cases = []
    for S, B, G, q, K in [(6, 2, 2, 3, 8), (5, 1, 1, 1, 16), (4, 2, 4, 1, 32)]:
        positions = torch.arange(S, device=device)[:, None].expand(S, B)
        tables = rotary_tables(positions, head_size=K, theta=10000.0, dtype=dtype)
        cases.append((torch.randn(S, B, G, q + 2, K, generator=generator, dtype=dtype, device=device), *tables))
    return cases
