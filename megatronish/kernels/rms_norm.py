"""RMSNorm (Zhang and Sennrich 2019): y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension;
and of a sum, which it gives too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatronish.kernels import peers
from megatronish.kernels.cuda import norms as cuda_norms
from megatronish.kernels.installed import refuses_triton
from megatronish.kernels.registry import Implementation, accumulate_dtype, register


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


def _reference_forward(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(x.to(accumulate_dtype(x)).square().mean(-1, keepdim=True) + eps)
    return reference(x, weight_D, eps), rstd


def _reference_backward(dy: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    # By autograd, over the formula with rstd as a function of x: eps is what rstd leaves of the mean square.
    wide = rstd.dtype
    with torch.enable_grad():
        given, weight = x.detach().to(wide).requires_grad_(), weight_D.detach().to(wide).requires_grad_()
        eps = rstd.pow(-2) - given.detach().square().mean(-1, keepdim=True)
        y = given * torch.rsqrt(given.square().mean(-1, keepdim=True) + eps) * weight
    dx, dweight = torch.autograd.grad(y, (given, weight), dy.to(wide))
    return dx.to(x.dtype), dweight.to(weight_D.dtype)


def _triton_forward(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from megatronish.kernels.triton import norms

    y, _, rstd, _ = norms.norm_forward(x.contiguous(), weight_D.contiguous(), None, eps)
    return y if x.is_contiguous() else torch.empty_like(x).copy_(y), rstd


def _triton_backward(dy: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    from megatronish.kernels.triton import norms

    dx, dweight, _ = norms.norm_backward(dy.contiguous(), x.contiguous(), weight_D.contiguous(), rstd, None)
    return dx if x.is_contiguous() else torch.empty_like(x).copy_(dx), dweight


def _refuses_triton(x: Tensor, *others: Any) -> str | None:
    return refuses_triton(x)


_BODIES = {
    "reference": Implementation(_reference_forward),
    "triton": Implementation(_triton_forward, _refuses_triton),
    **peers.RMS_NORM,
    "cuda": Implementation(cuda_norms.rms_norm, cuda_norms.refuses),
}
_BACKWARD_BODIES = {
    "reference": Implementation(_reference_backward),
    "triton": Implementation(_triton_backward, _refuses_triton),
    **peers.RMS_NORM_BACKWARD,
    "cuda": Implementation(cuda_norms.rms_norm_backward, cuda_norms.refuses_backward),
}
_forward_op = register("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", _forward, _forward_fake, also=_BODIES)
_backward_op = register(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    also=_BACKWARD_BODIES,
    choice="rms_norm",
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


def add_reference(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: (norm of the sum, the sum), which is rounded to x's dtype since later layers see it."""
    summed = x + residual
    return reference(summed, weight_D, eps), summed


def _add_forward(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    summed = x.contiguous() + residual.contiguous()
    y, rstd = _forward(summed, weight_D, eps)
    return y, summed, rstd


def _add_forward_fake(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=accumulate_dtype(x))
    return x.new_empty(x.shape), x.new_empty(x.shape), rstd


def _add_backward(dy: Tensor, dsum: Tensor, summed: Tensor, weight_D: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, dweight = _backward(dy, summed, weight_D, rstd)
    return dx.add_(dsum), dweight


def _add_backward_fake(dy: Tensor, dsum: Tensor, summed: Tensor, weight_D: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return summed.new_empty(summed.shape), torch.empty_like(weight_D)


def _triton_add_forward(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from megatronish.kernels.triton import norms

    y, summed, rstd, _ = norms.norm_forward(x.contiguous(), weight_D.contiguous(), None, eps, residual.contiguous())
    return y, summed, rstd


def _triton_add_backward(dy: Tensor, dsum: Tensor, summed: Tensor, weight_D: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    from megatronish.kernels.triton import norms

    dx, dweight, _ = norms.norm_backward(dy.contiguous(), summed, weight_D.contiguous(), rstd, None, dsum.contiguous())
    return dx, dweight


_add_forward_op = register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    _add_forward,
    _add_forward_fake,
    also={
        "triton": Implementation(_triton_add_forward, _refuses_triton),
        "cuda": Implementation(cuda_norms.add_rms_norm, cuda_norms.refuses_add),
    },
)
_add_backward_op = register(
    "add_rms_norm_backward(Tensor dy, Tensor dsum, Tensor sum, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    _add_backward,
    _add_backward_fake,
    also={
        "triton": Implementation(_triton_add_backward, _refuses_triton),
        "cuda": Implementation(cuda_norms.add_rms_norm_backward, cuda_norms.refuses_add_backward),
    },
    choice="add_rms_norm",
)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, summed, rstd = _add_forward_op(x, residual, weight_D, eps)
        ctx.save_for_backward(summed, weight_D, rstd)
        return y, summed

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dsum: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        dx, dweight = _add_backward_op(dy.contiguous(), dsum.contiguous(), *ctx.saved_tensors)
        return dx, dx, dweight, None


def add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of x + residual, x + residual), in one pass over memory; x and residual [..., D] and weight [D] of one floating dtype.
    Saves the sum and one scalar a row for backward, which adds the sum's own gradient on the way."""
    out: tuple[Tensor, Tensor] = _AddRMSNorm.apply(x, residual, weight_D, eps)
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


def add_sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    """The same with a residual."""
    return [(x, x.flip(0) * 2, *others) for x, *others in sample_inputs(dtype, device)]
