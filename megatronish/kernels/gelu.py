"""GELU (Hendrycks and Gimpel 2016) by GPT-2's formula: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatronish.kernels.installed import refuses_triton_of_float32
from megatronish.kernels.registry import Implementation, accumulate_dtype, register


def reference(x: Tensor) -> Tensor:
    """Plain PyTorch, in the accumulation dtype, rounded once."""
    wide = x.to(accumulate_dtype(x))
    inner = math.sqrt(2.0 / math.pi) * (wide + 0.044715 * wide**3)
    return (0.5 * wide * (1.0 + inner.tanh())).to(x.dtype)


def _forward(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _backward(dy: Tensor, x: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten.gelu_backward(dy, x, approximate="tanh")
    return out


def _forward_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _backward_fake(dy: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _triton_forward(x: Tensor) -> Tensor:
    from megatronish.kernels.triton import gelu

    y = gelu.gelu(x)
    return y if x.is_contiguous() else torch.empty_like(x).copy_(y)


def _triton_backward(dy: Tensor, x: Tensor) -> Tensor:
    from megatronish.kernels.triton import gelu

    dx = gelu.gelu_backward(dy, x)
    return dx if x.is_contiguous() else torch.empty_like(x).copy_(dx)


def _refuses_triton(x: Tensor, *others: Any) -> str | None:
    return refuses_triton_of_float32(x)


_forward_op = register(
    "gelu(Tensor x) -> Tensor", _forward, _forward_fake, also={"triton": Implementation(_triton_forward, _refuses_triton)}
)
_backward_op = register(
    "gelu_backward(Tensor dy, Tensor x) -> Tensor",
    _backward,
    _backward_fake,
    also={"triton": Implementation(_triton_backward, _refuses_triton)},
    choice="gelu",
)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _forward_op(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return _backward_op(dy, *ctx.saved_tensors)


def gelu(x: Tensor) -> Tensor:
    """[..., F] -> [..., F], any floating dtype. Saves its input."""
    out: Tensor = _Gelu.apply(x)
    return out


def sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Tensor]]:
    """Inputs that tests and benches run every implementation on."""
    generator = torch.Generator(device).manual_seed(0)
    return [(torch.randn(*s, generator=generator, dtype=dtype, device=device) * 3,) for s in [(4, 2, 32), (1, 1, 1), (7, 3, 43)]]
