"""RMSNorm (Zhang and Sennrich 2019): y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatronish.kernels.registry import accumulate_dtype, register


def reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Plain PyTorch. The normalised x is rounded to x's dtype before the weight, as in Hugging Face's Llama."""
    wide = x.to(accumulate_dtype(x))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd).to(x.dtype) * weight_D


def _forward(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(accumulate_dtype(x))
    # vector_norm squares and sums in one pass over x.
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().mul_(1.0 / x.shape[-1])
    rstd = mean_square.add_(eps).rsqrt_()
    return (wide * rstd).to(x.dtype).mul_(weight_D), rstd


def _forward_fake(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=accumulate_dtype(x))


def _backward(dy: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    normed = x.to(rstd.dtype) * rstd
    dy_wide = dy.to(rstd.dtype)
    # Plain products and sums: einsum and vecdot go through bmm, one tiny product a column or a row (15 times slower on CPU).
    dweight = (dy_wide * normed).flatten(0, -2).sum(0).to(weight_D.dtype)
    dnormed = dy_wide * weight_D
    mean = (dnormed * normed).sum(-1, keepdim=True).mul_(1.0 / x.shape[-1])
    return dnormed.sub_(normed.mul_(mean)).mul_(rstd).to(x.dtype), dweight


def _backward_fake(dy: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight_D)


_forward_op = register("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", _forward, _forward_fake)
_backward_op = register(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)", _backward, _backward_fake
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y, rstd = _forward_op(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        dx, dweight = _backward_op(dy.contiguous(), *ctx.saved_tensors)
        return dx, dweight, None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x [..., D] and weight [D] of one floating dtype -> [..., D] of that dtype. Saves x and one scalar a row for backward."""
    out: Tensor = _RMSNorm.apply(x, weight_D, eps)
    return out


def sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Tensor, Tensor, float]]:
    """Inputs that tests and benches run every implementation on."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(4, 2, 64), (1, 1, 8), (5, 3, 96)]
    return [
        (
            torch.randn(*s, generator=generator, dtype=dtype, device=device),
            torch.randn(s[-1], generator=generator, dtype=dtype, device=device),
            1e-5,
        )
        for s in shapes
    ]
