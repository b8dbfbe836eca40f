"""GeGLU (Shazeer 2020): gelu(gate) * up, GELU by GPT-2's formula, on a packed projection whose first half is the gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatronish.kernels.installed import refuses_triton_of_float32
from megatronish.kernels.registry import Implementation, register


def reference(gate_up: Tensor) -> Tensor:
    """Plain PyTorch, in the input's dtype, as Hugging Face's Gemma computes it."""
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def _forward_fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    out = torch.empty_like(gate_up)
    dgate, dup = out.chunk(2, -1)
    torch.mul(dy, torch.nn.functional.gelu(gate, approximate="tanh"), out=dup)
    torch.ops.aten.gelu_backward.grad_input(dy * up, gate, approximate="tanh", grad_input=dgate)
    return out


def _backward_fake(dy: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up)


def _triton_forward(gate_up: Tensor) -> Tensor:
    from megatronish.kernels.triton import gated

    return gated.geglu(gate_up)


def _triton_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    from megatronish.kernels.triton import gated

    grad = gated.geglu_backward(dy, gate_up)
    return grad if gate_up.is_contiguous() else torch.empty_like(gate_up).copy_(grad)


def _refuses_triton(x: Tensor, *others: Any) -> str | None:
    return refuses_triton_of_float32(x)


_forward_op = register(
    "geglu(Tensor gate_up) -> Tensor",
    reference,
    _forward_fake,
    also={"triton": Implementation(_triton_forward, _refuses_triton)},
)
_backward_op = register(
    "geglu_backward(Tensor dy, Tensor gate_up) -> Tensor",
    _backward,
    _backward_fake,
    also={"triton": Implementation(_triton_backward, _refuses_triton)},
    choice="geglu",
)


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _forward_op(gate_up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return _backward_op(dy, *ctx.saved_tensors)


def geglu(gate_up: Tensor) -> Tensor:
    """[..., 2F] -> [..., F], any floating dtype; the gate is the first half. Saves its input."""
    out: Tensor = _GeGLU.apply(gate_up)
    return out


def sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Tensor]]:
    """Inputs that tests and benches run every implementation on."""
    generator = torch.Generator(device).manual_seed(0)
    return [(torch.randn(*s, generator=generator, dtype=dtype, device=device) * 3,) for s in [(4, 2, 32), (1, 1, 2), (7, 3, 86)]]
