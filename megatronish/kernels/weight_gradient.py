"""The weight gradient of a linear layer, accumulated straight into its gradient bucket: bucket += dY^T X, one product."""

from __future__ import annotations

import torch
from torch import Tensor

from megatronish.kernels.registry import register


def reference(bucket_OI: Tensor, dy_TO: Tensor, x_TI: Tensor) -> None:
    """Plain PyTorch."""
    bucket_OI.add_((dy_TO.to(bucket_OI.dtype).t() @ x_TI.to(bucket_OI.dtype)))


def _body(bucket_OI: Tensor, dy_TO: Tensor, x_TI: Tensor) -> None:
    if bucket_OI.dtype == dy_TO.dtype:
        bucket_OI.addmm_(dy_TO.t(), x_TI)
    elif dy_TO.device.type == "cuda":
        bucket_OI.add_(torch.mm(dy_TO.t(), x_TI, out_dtype=bucket_OI.dtype))
    else:
        # On CPU the bf16 product accumulates in fp32 inside and is rounded to bf16 once; the sum over microbatches is fp32.
        bucket_OI.add_(dy_TO.t() @ x_TI)


def _fake(bucket_OI: Tensor, dy_TO: Tensor, x_TI: Tensor) -> None:
    return None


accumulate_weight_gradient = register("accumulate_weight_gradient(Tensor(a!) bucket, Tensor dy, Tensor x) -> ()", _body, _fake)
"""bucket [O, I] += dy [T, O]^T x [T, I]; the bucket is float32 (or float64), dy and x have the activations' dtype."""


def _rows_body(bucket_VD: Tensor, dy_TD: Tensor, rows_T: Tensor) -> None:
    # Rows of other ranks add zero to row 0: no data-dependent shape, so nothing waits for the device.
    here_T = (rows_T >= 0) & (rows_T < bucket_VD.shape[0])
    bucket_VD.index_add_(0, rows_T * here_T, dy_TD.to(bucket_VD.dtype) * here_T[:, None])


accumulate_row_gradient = register("accumulate_row_gradient(Tensor(a!) bucket, Tensor dy, Tensor rows) -> ()", _rows_body, _fake)
"""bucket [V, D] at rows[t] += dy [T, D] at t, for rows int64 [T] inside [0, V); others are left out."""
