"""residual + dropout(gelu(x + bias)) in one pass over memory; each part but x may be left out.

GELU by GPT-2's formula, dropout's bits those of dropout.py. A block uses residual + dropout(x). Its biases stay with the linears:
a matrix product adds one on its way out for nothing, and who owns the product owes the bias its gradient.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from megatronish.kernels import dropout
from megatronish.kernels.gelu import reference as gelu_reference
from megatronish.kernels.installed import refuses_triton_of_float32
from megatronish.kernels.registry import Implementation, accumulate_dtype, register


def reference(
    x_SBD: Tensor,
    bias_D: Tensor | None,
    residual_SBD: Tensor | None,
    samples_B: Tensor | None,
    use_gelu: bool,
    first: int,
    key: int,
    rate: float,
) -> Tensor:
    """Plain PyTorch."""
    out = x_SBD if bias_D is None else x_SBD + bias_D
    out = gelu_reference(out) if use_gelu else out
    out = out if samples_B is None else dropout.reference(out, samples_B, 1, first, key, rate)
    return out.clone() if residual_SBD is None else residual_SBD + out


def _inner(x_SBD: Tensor, bias_D: Tensor | None) -> Tensor:
    return x_SBD if bias_D is None else x_SBD + bias_D


def _forward(
    x_SBD: Tensor,
    bias_D: Tensor | None,
    residual_SBD: Tensor | None,
    samples_B: Tensor | None,
    use_gelu: bool,
    first: int,
    key: int,
    rate: float,
) -> Tensor:
    out = _inner(x_SBD, bias_D).contiguous()
    if use_gelu:
        out = torch.nn.functional.gelu(out, approximate="tanh")
    if samples_B is not None:
        out = dropout.drop(out, samples_B, 1, first, key, rate)
    if residual_SBD is not None:
        return torch.add(residual_SBD.contiguous(), out)
    return out.clone() if out is x_SBD else out


def _forward_fake(x_SBD: Tensor, *others: Any) -> Tensor:
    return x_SBD.new_empty(x_SBD.shape)


def _backward(
    dy_SBD: Tensor,
    x_SBD: Tensor,
    bias_D: Tensor | None,
    samples_B: Tensor | None,
    use_gelu: bool,
    first: int,
    key: int,
    rate: float,
) -> tuple[Tensor, Tensor]:
    dx = dy_SBD.contiguous()
    if samples_B is not None:
        dx = dropout.drop(dx, samples_B, 1, first, key, rate)
    if use_gelu:
        dx = torch.ops.aten.gelu_backward(dx, _inner(x_SBD, bias_D).contiguous(), approximate="tanh")
    dbias = x_SBD.new_empty(0)
    if bias_D is not None:
        dbias = dx.flatten(0, -2).sum(0, dtype=accumulate_dtype(x_SBD)).to(x_SBD.dtype)
    return (dx.clone() if dx is dy_SBD else dx), dbias


def _backward_fake(dy_SBD: Tensor, x_SBD: Tensor, bias_D: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    return dy_SBD.new_empty(dy_SBD.shape), x_SBD.new_empty(0 if bias_D is None else x_SBD.shape[-1])


def _triton_forward(*arguments: Any) -> Tensor:
    from megatronish.kernels.triton import gelu

    return gelu.forward(*arguments)


def _triton_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from megatronish.kernels.triton import gelu

    return gelu.backward(*arguments)


def _refuses_triton(x: Tensor, *others: Any) -> str | None:
    return refuses_triton_of_float32(x)


def _refuses_triton_backward(dy: Tensor, x: Tensor, bias: Tensor | None, samples: Tensor | None, *others: Any) -> str | None:
    if bias is not None and samples is not None and x.shape[-1] % 4:
        return f"the gradient of a bias of {x.shape[-1]} elements under dropout (multiples of 4 only)"
    return refuses_triton_of_float32(x)


_forward_op = register(
    "bias_gelu_dropout_add(Tensor x, Tensor? bias, Tensor? residual, Tensor? samples, bool use_gelu, int first, int key,"
    " float rate) -> Tensor",
    _forward,
    _forward_fake,
    also={"triton": Implementation(_triton_forward, _refuses_triton)},
)
_backward_op = register(
    "bias_gelu_dropout_add_backward(Tensor dy, Tensor x, Tensor? bias, Tensor? samples, bool use_gelu, int first, int key,"
    " float rate) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    also={"triton": Implementation(_triton_backward, _refuses_triton_backward)},
    choice="bias_gelu_dropout_add",
)


class _BiasGeluDropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, residual: Tensor | None, samples_B: Tensor | None, *numbers: Any
    ) -> Tensor:
        (use_gelu, *_) = numbers
        ctx.save_for_backward(*((x, bias) if use_gelu else ()))
        # Not by save_for_backward: see dropout.py. Without GELU a bias's gradient needs no more than that it is there.
        ctx.samples_B, ctx.numbers, ctx.has = samples_B, numbers, (bias is not None, residual is not None)
        return _forward_op(x, bias, residual, samples_B, *numbers)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        has_bias, has_residual = ctx.has
        x, bias = ctx.saved_tensors or (dy, dy.new_zeros(dy.shape[-1]) if has_bias else None)
        dx, dbias = _backward_op(dy, x, bias, ctx.samples_B, *ctx.numbers)
        return dx, dbias if has_bias else None, dy if has_residual else None, None, None, None, None, None


def bias_gelu_dropout_add(
    x_SBD: Tensor,
    bias_D: Tensor | None,
    residual_SBD: Tensor | None,
    samples_B: Tensor | None,
    *,
    activation: Literal["gelu", "none"],
    first: int = 0,
    key: int = 0,
    rate: float = 0.0,
) -> Tensor:
    """residual + dropout(activation(x + bias)), [S, B, D] of one floating dtype; None leaves a part out. samples_B int64 [B],
    first, key, rate: those of `dropout`, whose bits it draws. Saves x and the bias for GELU alone."""
    numbers = (activation == "gelu", first, key, rate)
    out: Tensor = _BiasGeluDropoutAdd.apply(x_SBD, bias_D, residual_SBD, samples_B, *numbers)
    return out


def sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    """Inputs that tests and benches run every implementation on: all parts, and each left out."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype, device=device)

    samples_B = torch.arange(2, device=device) * 3_000_000_001
    cases: list[tuple[Any, ...]] = []
    for S, D, has_bias, has_residual, has_dropout, use_gelu in [
        (5, 36, True, True, True, True),
        (3, 7, False, True, True, False),
        (4, 30, True, False, False, True),
        (3, 20, True, True, True, False),
        (2, 9, True, True, False, False),
    ]:
        parts = (draw(D) if has_bias else None, draw(S, 2, D) if has_residual else None, samples_B if has_dropout else None)
        cases.append((draw(S, 2, D), *parts, use_gelu, 3, -(2**61) + 9, 0.3 if has_dropout else 0.0))
    return cases
