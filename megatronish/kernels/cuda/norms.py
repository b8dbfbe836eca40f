"""RMSNorm and LayerNorm with an optional residual: csrc/cuda/norms.cu. float32, float16, bfloat16; D up to 65,536.

Deterministic: partial sums of dweight and dbias are added in a fixed order; how many there are depends on the device's size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatronish.kernels.cuda.launch import DTYPES, dense, module, stream_of, unavailable

LONGEST = 65536


def refuses(x: Tensor, weight_D: Tensor, *others: Any) -> str | None:
    """Why these kernels do not take such inputs; None: they do, backward too."""
    missing = unavailable(x)
    if missing is not None:
        return missing
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype} (float32, float16 and bfloat16 only)"
    if weight_D.dtype != x.dtype:
        return f"a weight of {weight_D.dtype} for {x.dtype}"
    D, multiple = x.shape[-1], 16 // x.element_size()
    if D % multiple or not 0 < D <= LONGEST:
        return f"rows of {D} elements (multiples of {multiple} up to {LONGEST} only)"
    return None


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else dense(x) for x in tensors]


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def forward(
    x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Contiguous (y, x + residual or x itself, 1 / deviation [..., 1], mean [..., 1] where there is a bias) of x [..., D]; RMSNorm
    where bias is None. Statistics are float32."""
    D = x.shape[-1]
    x, given = dense(x), _dense(residual, weight_D, bias_D)
    y = torch.empty_like(x)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    mean = None if bias_D is None else torch.empty_like(rstd)
    summed = x if residual is None else torch.empty_like(x)
    if x.numel():
        addresses = _addresses(x, *given, y, summed, mean, rstd)
        module().norm_forward(DTYPES[x.dtype], rstd.numel(), D, *addresses, eps=eps, stream=stream_of(x))
    return y, summed, rstd, mean


def backward(
    dy: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor, mean: Tensor | None, dsum: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Contiguous (dx, dweight, dbias) of dy and x [..., D]; LayerNorm where `mean` is given. x is what was normalised; `dsum`, the
    gradient that it has besides, is added to dx."""
    D, rows, dtype = x.shape[-1], rstd.numel(), DTYPES[x.dtype]
    if rows == 0:
        return torch.empty_like(x), torch.zeros_like(weight_D), None if mean is None else torch.zeros_like(weight_D)
    given = _dense(dy, dsum, x, weight_D, mean, rstd)
    dx, dweight = x.new_empty(x.shape), weight_D.new_empty(D)
    parts = module().norm_parts(dtype, rows, D, mean is not None)
    dweight_parts = rstd.new_empty((parts, D))
    dbias, dbias_parts = (None, None) if mean is None else (weight_D.new_empty(D), torch.empty_like(dweight_parts))
    addresses = _addresses(*given, dx, dweight, dbias, dweight_parts, dbias_parts)
    module().norm_backward(dtype, rows, D, parts, *addresses, stream=stream_of(x))
    return dx, dweight, dbias


def refuses_backward(dy: Tensor, x: Tensor, weight_D: Tensor, *others: Any) -> str | None:
    """`refuses`, of a backward op's arguments."""
    return refuses(x, weight_D)


def _like(result: Tensor, x: Tensor) -> Tensor:
    """`result` in the layout of x, which is what the op's other bodies give."""
    return result if x.is_contiguous() else torch.empty_like(x).copy_(result)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The op of kernels/rms_norm.py."""
    y, _, rstd, _ = forward(x, weight_D, None, eps)
    return _like(y, x), rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The backward op of kernels/rms_norm.py."""
    dx, dweight, _ = backward(dy, x, weight_D, rstd, None)
    return _like(dx, x), dweight


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The op of kernels/layer_norm.py."""
    y, _, rstd, mean = forward(x, weight_D, bias_D, eps)
    assert mean is not None
    return y, mean, rstd


def layer_norm_backward(dy: Tensor, x: Tensor, weight_D: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The backward op of kernels/layer_norm.py."""
    dx, dweight, dbias = backward(dy, x, weight_D, rstd, mean)
    assert dbias is not None
    return dx, dweight, dbias


def refuses_add(x: Tensor, residual: Tensor, weight_D: Tensor, *others: Any) -> str | None:
    """`refuses`, of the ops that add first."""
    return refuses(x, weight_D)


def refuses_add_backward(dy: Tensor, dsum: Tensor, summed: Tensor, weight_D: Tensor, *others: Any) -> str | None:
    """`refuses`, of their backward ops' arguments."""
    return refuses(summed, weight_D)


def add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The op of kernels/rms_norm.py."""
    y, summed, rstd, _ = forward(x, weight_D, None, eps, residual)
    return y, summed, rstd


def add_rms_norm_backward(dy: Tensor, dsum: Tensor, summed: Tensor, weight_D: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The backward op of kernels/rms_norm.py."""
    dx, dweight, _ = backward(dy, summed, weight_D, rstd, None, dsum)
    return dx, dweight


def add_layer_norm(
    x: Tensor, residual: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op of kernels/layer_norm.py."""
    y, summed, rstd, mean = forward(x, weight_D, bias_D, eps, residual)
    assert mean is not None
    return y, summed, mean, rstd


def add_layer_norm_backward(
    dy: Tensor, dsum: Tensor, summed: Tensor, weight_D: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward op of kernels/layer_norm.py."""
    dx, dweight, dbias = backward(dy, summed, weight_D, rstd, mean, dsum)
    assert dbias is not None
    return dx, dweight, dbias
