"""The three products of a linear layer, y = x W^T + b: forward, input gradient, and gradients added straight into their buckets.

A weight may have structured leading dimensions [..., I] (heads, gate and up); they count as one, O.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatronish.kernels.registry import accumulate_dtype, register


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Plain PyTorch: x W^T + b."""
    return torch.nn.functional.linear(x, weight.flatten(0, -2), None if bias is None else bias.flatten())


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], math.prod(weight.shape[:-1]))


def input_gradient_reference(dy: Tensor, weight: Tensor) -> Tensor:
    """Plain PyTorch: dY W."""
    return torch.matmul(dy, weight.flatten(0, -2))


def _input_gradient_fake(dy: Tensor, weight: Tensor) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], weight.shape[-1])


def weight_gradient_reference(bucket: Tensor, dy: Tensor, x: Tensor) -> None:
    """Plain PyTorch: bucket += dY^T X in the bucket's dtype."""
    wide = dy.flatten(0, -2).to(bucket.dtype).t() @ x.flatten(0, -2).to(bucket.dtype)
    bucket.add_(wide.view_as(bucket))


def _weight_gradient(bucket: Tensor, dy: Tensor, x: Tensor) -> None:
    bucket_OI, dy_OT, x_TI = bucket.flatten(0, -2), dy.flatten(0, -2).t(), x.flatten(0, -2)
    if bucket.dtype == dy.dtype:
        bucket_OI.addmm_(dy_OT, x_TI)
    elif dy.device.type == "cuda":
        bucket_OI.add_(torch.mm(dy_OT, x_TI, out_dtype=bucket.dtype))
    else:
        # On CPU the bf16 product accumulates in fp32 inside and is rounded to bf16 once; the sum over microbatches is fp32.
        bucket_OI.add_(dy_OT @ x_TI)


def _bias_gradient(bucket: Tensor, dy: Tensor) -> None:
    bucket.add_(dy.flatten(0, -2).sum(0, dtype=bucket.dtype).view_as(bucket))


def _row_gradient(bucket_VD: Tensor, dy: Tensor, rows: Tensor) -> None:
    # Rows of other ranks add zero to row 0: no data-dependent shape, so nothing waits for the device.
    here = (rows >= 0) & (rows < bucket_VD.shape[0])
    bucket_VD.index_add_(0, (rows * here).flatten(), (dy.to(bucket_VD.dtype) * here[..., None]).flatten(0, -2))


def _nothing(*arguments: Tensor) -> None:
    return None


linear = register("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", reference, _forward_fake)
"""x [..., I], weight [..., I], bias [...] -> [..., O], of one dtype. Without autograd: `parallel/tensor.py` owns its backward."""

linear_input_gradient = register(
    "linear_input_gradient(Tensor dy, Tensor weight) -> Tensor", input_gradient_reference, _input_gradient_fake
)
"""dy [..., O], weight [..., I] -> dx [..., I]."""

accumulate_weight_gradient = register(
    "accumulate_weight_gradient(Tensor(a!) bucket, Tensor dy, Tensor x) -> ()", _weight_gradient, _nothing
)
"""bucket, shaped like the weight, += dy [..., O]^T x [..., I]; bucket: float32 (or float64), dy and x: the activations' dtype."""

accumulate_bias_gradient = register("accumulate_bias_gradient(Tensor(a!) bucket, Tensor dy) -> ()", _bias_gradient, _nothing)
"""bucket, shaped like the bias, += the sum of dy [..., O] over all but its last dimension, summed in the bucket's dtype."""

accumulate_row_gradient = register(
    "accumulate_row_gradient(Tensor(a!) bucket, Tensor dy, Tensor rows) -> ()", _row_gradient, _nothing
)
"""bucket [V, D] at rows[...] += dy [..., D], for rows int64 inside [0, V); others are left out."""


def bias_gradient_reference(bucket: Tensor, dy: Tensor) -> None:
    """Plain PyTorch, token by token."""
    for dy_O in dy.flatten(0, -2).to(bucket.dtype):
        bucket.add_(dy_O.view_as(bucket))


def row_gradient_reference(bucket_VD: Tensor, dy: Tensor, rows: Tensor) -> None:
    """Plain PyTorch, row by row."""
    for row, dy_D in zip(rows.flatten().tolist(), dy.flatten(0, -2), strict=True):
        if 0 <= row < bucket_VD.shape[0]:
            bucket_VD[row] += dy_D.to(bucket_VD.dtype)


def _random(dtype: torch.dtype, device: str) -> Callable[..., Tensor]:
    return partial(torch.randn, generator=torch.Generator(device).manual_seed(0), dtype=dtype, device=device)


def sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Inputs that tests and benches run every implementation on: (x, weight, bias or None)."""
    draw = _random(dtype, device)
    return [
        (draw(5, 2, 24), draw(16, 24), None),
        (draw(3, 1, 8), draw(2, 4, 6, 8), draw(2, 4, 6)),
        (draw(1, 1, 33), draw(2, 7, 33), None),
        (draw(4, 3, 9), draw(5, 9), draw(5)),
    ]


def input_gradient_sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Tensor, Tensor]]:
    """(dy, weight)."""
    draw = _random(dtype, device)
    return [(draw(*x.shape[:-1], math.prod(w.shape[:-1])), w) for x, w, _ in sample_inputs(dtype, device)]


def weight_gradient_sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(bucket, dy, x)."""
    draw = _random(dtype, device)
    return [
        (draw(*w.shape).to(accumulate_dtype(x)), draw(*x.shape[:-1], math.prod(w.shape[:-1])), x)
        for x, w, _ in sample_inputs(dtype, device)
    ]


def bias_gradient_sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Tensor, Tensor]]:
    """(bucket, dy)."""
    draw, cases = _random(dtype, device), []
    for shape, tokens in [((16,), (5, 2)), ((2, 3, 4), (4, 3)), ((7,), (1, 1))]:
        dy = draw(*tokens, math.prod(shape))
        cases.append((draw(*shape).to(accumulate_dtype(dy)), dy))
    return cases


def row_gradient_sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(bucket, dy, rows); some rows are another rank's, below or above, and some come more than once."""
    draw, generator = _random(dtype, device), torch.Generator(device).manual_seed(1)
    cases = []
    for S, B, V, D in [(6, 2, 8, 16), (9, 1, 3, 5)]:
        dy = draw(S, B, D)
        rows = torch.randint(-V, 2 * V, (S, B), generator=generator, device=device)
        cases.append((draw(V, D).to(accumulate_dtype(dy)), dy, rows))
    return cases
