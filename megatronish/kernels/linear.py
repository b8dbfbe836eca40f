"""The three products of a linear layer, y = x W^T: forward, input gradient, and weight gradient added straight into its bucket.

A weight may have structured leading dimensions [..., I] (heads, gate and up); they count as one, O.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatronish.kernels.registry import register


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight.flatten(0, -2))


def _forward_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], math.prod(weight.shape[:-1]))


def _input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
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


def _row_gradient(bucket_VD: Tensor, dy: Tensor, rows: Tensor) -> None:
    # Rows of other ranks add zero to row 0: no data-dependent shape, so nothing waits for the device.
    here = (rows >= 0) & (rows < bucket_VD.shape[0])
    bucket_VD.index_add_(0, (rows * here).flatten(), (dy.to(bucket_VD.dtype) * here[..., None]).flatten(0, -2))


def _nothing(bucket: Tensor, dy: Tensor, x: Tensor) -> None:
    return None


linear = register("linear(Tensor x, Tensor weight) -> Tensor", _forward, _forward_fake)
"""x [..., I], weight [..., I] -> [..., O], of one dtype. Without autograd: `parallel/tensor.py` owns its backward."""

linear_input_gradient = register("linear_input_gradient(Tensor dy, Tensor weight) -> Tensor", _input_gradient, _input_gradient_fake)
"""dy [..., O], weight [..., I] -> dx [..., I]."""

accumulate_weight_gradient = register("accumulate_weight_gradient(Tensor(a!) bucket, Tensor dy, Tensor x) -> ()", _weight_gradient, _nothing)
"""bucket, shaped like the weight, += dy [..., O]^T x [..., I]; the bucket is float32 (or float64), dy and x have the activations' dtype."""

accumulate_row_gradient = register("accumulate_row_gradient(Tensor(a!) bucket, Tensor dy, Tensor rows) -> ()", _row_gradient, _nothing)
"""bucket [V, D] at rows[...] += dy [..., D], for rows int64 inside [0, V); others are left out."""
