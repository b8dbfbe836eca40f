"""LayerNorm (Ba et al. 2016): y = (x - mean) / sqrt(variance + eps) * weight + bias, over the last
dimension; and of a sum, which it gives too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatronish.kernels import peers
from megatronish.kernels.cuda import norms as cuda_norms
from megatronish.kernels.installed import refuses_triton
from megatronish.kernels.registry import Implementation, accumulate_dtype, register


def reference(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """Plain PyTorch: all of it in the accumulation dtype, rounded to x's dtype once, as torch's own does."""
    wide = x.to(accumulate_dtype(x))
    centered = wide - wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    return (centered * rstd * weight_D + bias_D).to(x.dtype)


def _forward(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    # torch's CPU kernel keeps statistics in the weights' dtype: those are widened. Its GPU kernel widens, and wants one dtype.
    wide = x.dtype if x.device.type == "cuda" else accumulate_dtype(x)
    return torch.native_layer_norm(x, x.shape[-1:], weight_D.to(wide), bias_D.to(wide), eps)


def _forward_fake(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty((*x.shape[:-1], 1), dtype=accumulate_dtype(x))
    return x.new_empty(x.shape), statistics, torch.empty_like(statistics)


def _backward(dy: Tensor, x: Tensor, weight_D: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # All of it widened: for bfloat16 inputs torch's CPU kernel sums dweight with an error above its rounding.
    wide = rstd.dtype
    dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
        dy.to(wide), x.to(wide), x.shape[-1:], mean, rstd, weight_D.to(wide), None, [True, True, False]
    )
    dbias = dy.flatten(0, -2).sum(0, dtype=wide)
    return dx.to(x.dtype), dweight.to(weight_D.dtype), dbias.to(weight_D.dtype)


def _backward_fake(dy: Tensor, x: Tensor, weight_D: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight_D), torch.empty_like(weight_D)


def _reference_forward(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(accumulate_dtype(x))
    mean = wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt((wide - mean).square().mean(-1, keepdim=True) + eps)
    return reference(x, weight_D, bias_D, eps).contiguous(), mean.contiguous(), rstd.contiguous()


def _reference_backward(dy: Tensor, x: Tensor, weight_D: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # By autograd, over the formula with mean and rstd as functions of x: eps is what rstd leaves of the variance.
    wide = rstd.dtype
    with torch.enable_grad():
        given, weight = x.detach().to(wide).requires_grad_(), weight_D.detach().to(wide).requires_grad_()
        centered = given - given.mean(-1, keepdim=True)
        variance = centered.square().mean(-1, keepdim=True)
        y = centered * torch.rsqrt(variance + (rstd.pow(-2) - variance.detach())) * weight
    dx, dweight = torch.autograd.grad(y, (given, weight), dy.to(wide))
    dbias = dy.to(wide).flatten(0, -2).sum(0)
    return dx.to(x.dtype).contiguous(), dweight.to(weight_D.dtype), dbias.to(weight_D.dtype)


def _triton_forward(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from megatronish.kernels.triton import norms

    y, _, rstd, mean = norms.norm_forward(x.contiguous(), weight_D.contiguous(), bias_D.contiguous(), eps)
    assert mean is not None
    return y, mean, rstd


def _triton_backward(dy: Tensor, x: Tensor, weight_D: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from megatronish.kernels.triton import norms

    dx, dweight, dbias = norms.norm_backward(dy.contiguous(), x.contiguous(), weight_D.contiguous(), rstd, mean)
    assert dbias is not None
    return dx, dweight, dbias


def _refuses_triton(x: Tensor, *others: Any) -> str | None:
    return refuses_triton(x)


_forward_op = register(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    also={
        "reference": Implementation(_reference_forward),
        "triton": Implementation(_triton_forward, _refuses_triton),
        **peers.LAYER_NORM,
        "cuda": Implementation(cuda_norms.layer_norm, cuda_norms.refuses),
    },
)
_backward_op = register(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    also={
        "reference": Implementation(_reference_backward),
        "triton": Implementation(_triton_backward, _refuses_triton),
        **peers.LAYER_NORM_BACKWARD,
        "cuda": Implementation(cuda_norms.layer_norm_backward, cuda_norms.refuses_backward),
    },
    choice="layer_norm",
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        y, mean, rstd = _forward_op(x, weight_D, bias_D, eps)
        ctx.save_for_backward(x, weight_D, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        dx, dweight, dbias = _backward_op(dy.contiguous(), *ctx.saved_tensors)
        return dx, dweight, dbias, None


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """x [..., D], weight and bias [D] of one floating dtype -> [..., D] of that dtype. Saves x and two scalars a row."""
    out: Tensor = _LayerNorm.apply(x, weight_D, bias_D, eps)
    return out


def add_reference(x: Tensor, residual: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: (norm of the sum, the sum), which is rounded to x's dtype since later layers see it."""
    summed = x + residual
    return reference(summed, weight_D, bias_D, eps), summed


def _add_forward(
    x: Tensor, residual: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    summed = x.contiguous() + residual.contiguous()
    y, mean, rstd = _forward(summed, weight_D, bias_D, eps)
    return y, summed, mean, rstd


def _add_forward_fake(
    x: Tensor, residual: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=accumulate_dtype(x))
    return x.new_empty(x.shape), x.new_empty(x.shape), rstd, torch.empty_like(rstd)


def _add_backward(
    dy: Tensor, dsum: Tensor, summed: Tensor, weight_D: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _backward(dy, summed, weight_D, mean, rstd)
    return dx.add_(dsum), dweight, dbias


def _add_backward_fake(
    dy: Tensor, dsum: Tensor, summed: Tensor, weight_D: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return summed.new_empty(summed.shape), torch.empty_like(weight_D), torch.empty_like(weight_D)


def _triton_add_forward(
    x: Tensor, residual: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from megatronish.kernels.triton import norms

    y, summed, rstd, mean = norms.norm_forward(
        x.contiguous(), weight_D.contiguous(), bias_D.contiguous(), eps, residual.contiguous()
    )
    assert summed is not None and mean is not None
    return y, summed, mean, rstd


def _triton_add_backward(
    dy: Tensor, dsum: Tensor, summed: Tensor, weight_D: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from megatronish.kernels.triton import norms

    dx, dweight, dbias = norms.norm_backward(dy.contiguous(), summed, weight_D.contiguous(), rstd, mean, dsum.contiguous())
    assert dbias is not None
    return dx, dweight, dbias


_add_forward_op = register(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _add_forward,
    _add_forward_fake,
    also={
        "triton": Implementation(_triton_add_forward, _refuses_triton),
        "cuda": Implementation(cuda_norms.add_layer_norm, cuda_norms.refuses_add),
    },
)
_add_backward_op = register(
    "add_layer_norm_backward(Tensor dy, Tensor dsum, Tensor sum, Tensor weight, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor)",
    _add_backward,
    _add_backward_fake,
    also={
        "triton": Implementation(_triton_add_backward, _refuses_triton),
        "cuda": Implementation(cuda_norms.add_layer_norm_backward, cuda_norms.refuses_add_backward),
    },
    choice="add_layer_norm",
)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, summed, mean, rstd = _add_forward_op(x, residual, weight_D, bias_D, eps)
        ctx.save_for_backward(summed, weight_D, mean, rstd)
        return y, summed

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dsum: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        dx, dweight, dbias = _add_backward_op(dy.contiguous(), dsum.contiguous(), *ctx.saved_tensors)
        return dx, dx, dweight, dbias, None


def add_layer_norm(x: Tensor, residual: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of x + residual, x + residual), in one pass over memory; x and residual [..., D] and the others [D] of one floating
    dtype. Saves the sum and two scalars a row for backward, which adds the sum's own gradient on the way."""
    out: tuple[Tensor, Tensor] = _AddLayerNorm.apply(x, residual, weight_D, bias_D, eps)
    return out


def sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Tensor, Tensor, Tensor, float]]:
    """Inputs that tests and benches run every implementation on."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype, device=device)

    return [(draw(*s), draw(s[-1]), draw(s[-1]), 1e-5) for s in [(4, 2, 64), (1, 1, 8), (5, 3, 96)]]


def add_sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    """The same with a residual."""
    return [(x, x.flip(0) * 2, *others) for x, *others in sample_inputs(dtype, device)]
