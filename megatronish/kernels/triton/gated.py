"""SwiGLU and GeGLU, forward and backward. See kernels/gated.py.

Bound by memory: forward reads 2 elements and writes 1, backward reads 3 and writes 2. Computed in float32, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatronish.kernels.triton.ahead import Ahead, signature
from megatronish.kernels.triton.gelu import gelu_and_slope

_BLOCK, _WARPS = 1024, 4
"""8 elements a thread of each array: 16 bytes of bfloat16."""


@triton.jit
def gate_and_slope(gate, GELU: tl.constexpr):
    """(act(gate), act'(gate))."""
    if GELU:
        value, slope = gelu_and_slope(gate)
    else:
        share = tl.sigmoid(gate)
        value = gate * share
        slope = share * (1.0 + gate * (1.0 - share))
    return value, slope


@triton.jit
def forward_kernel(gate_up_ptr, y_ptr, F, num_blocks, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    columns = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    mask = columns < F
    gate = tl.load(gate_up_ptr + row * 2 * F + columns, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * F + F + columns, mask=mask, other=0.0)
    value, _ = gate_and_slope(gate.to(tl.float32), GELU)
    tl.store(y_ptr + row * F + columns, (value * up.to(tl.float32)).to(gate.dtype), mask=mask)


@triton.jit
def backward_kernel(dy_ptr, gate_up_ptr, grad_ptr, F, num_blocks, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    columns = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    mask = columns < F
    gate = tl.load(gate_up_ptr + row * 2 * F + columns, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * F + F + columns, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * F + columns, mask=mask, other=0.0).to(tl.float32)
    value, slope = gate_and_slope(gate.to(tl.float32), GELU)
    tl.store(grad_ptr + row * 2 * F + columns, (dy * up * slope).to(gate.dtype), mask=mask)
    tl.store(grad_ptr + row * 2 * F + F + columns, (dy * value).to(gate.dtype), mask=mask)


def _forward(gate_up: Tensor, *, use_gelu: bool) -> Tensor:
    gate_up = gate_up.contiguous()
    F = gate_up.shape[-1] // 2
    y = gate_up.new_empty((*gate_up.shape[:-1], F))
    num_blocks = triton.cdiv(F, _BLOCK)
    if y.numel():
        grid = (y.numel() // F * num_blocks,)
        forward_kernel[grid](gate_up, y, F, num_blocks, GELU=use_gelu, BLOCK=_BLOCK, num_warps=_WARPS)
    return y


def _backward(dy: Tensor, gate_up: Tensor, *, use_gelu: bool) -> Tensor:
    gate_up, F = gate_up.contiguous(), dy.shape[-1]
    grad = torch.empty_like(gate_up)
    num_blocks = triton.cdiv(F, _BLOCK)
    if dy.numel():
        grid = (dy.numel() // F * num_blocks,)
        backward_kernel[grid](dy.contiguous(), gate_up, grad, F, num_blocks, GELU=use_gelu, BLOCK=_BLOCK, num_warps=_WARPS)
    return grad


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [..., 2F] -> [..., F]."""
    return _forward(gate_up, use_gelu=False)


def swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """[..., F], [..., 2F] -> [..., 2F]."""
    return _backward(dy, gate_up, use_gelu=False)


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up: [..., 2F] -> [..., F]."""
    return _forward(gate_up, use_gelu=True)


def geglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """[..., F], [..., 2F] -> [..., 2F]."""
    return _backward(dy, gate_up, use_gelu=True)


def ahead() -> Iterator[Ahead]:
    """Both activations, forward and backward."""
    for use_gelu, name in ((False, "swiglu"), (True, "geglu")):
        for kernel, way in ((forward_kernel, "forward"), (backward_kernel, "backward")):
            given = signature(kernel, "bf16", F="i32:16")
            yield Ahead(f"{name} {way}", kernel, given, {"GELU": use_gelu, "BLOCK": _BLOCK}, _WARPS)
