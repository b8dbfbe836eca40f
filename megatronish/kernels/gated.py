"""Gated activations (Shazeer 2020): f(gate) * up, on a packed projection whose first half is the gate.

SwiGLU: f is SiLU, as in Hugging Face's Llama; GeGLU: GELU by GPT-2's formula, as in its Gemma."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatronish.kernels.installed import refuses_triton_of_float32
from megatronish.kernels.registry import Implementation, register

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": torch.nn.functional.silu,
    "geglu": lambda gate: torch.nn.functional.gelu(gate, approximate="tanh"),
}
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "swiglu": lambda dy, gate, out: torch.ops.aten.silu_backward.grad_input(dy, gate, grad_input=out),
    "geglu": lambda dy, gate, out: torch.ops.aten.gelu_backward.grad_input(dy, gate, approximate="tanh", grad_input=out),
}
"""(upstream gradient, gate, where the gate's gradient goes)."""


def _forward_fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _backward_fake(dy: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up)


def _by_projection(dy: Tensor, gate_up: Tensor) -> tuple[Sequence[int], torch.dtype, str]:
    return gate_up.shape, gate_up.dtype, ""


def _refuses_triton(x: Tensor, *others: Any) -> str | None:
    return refuses_triton_of_float32(x)


def _reference(name: str) -> Callable[[Tensor], Tensor]:
    def reference(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return _ACTIVATIONS[name](gate) * up

    return reference


def _backward(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    def backward(dy: Tensor, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        dgate, dup = out.chunk(2, -1)
        torch.mul(dy, _ACTIVATIONS[name](gate), out=dup)
        _DERIVATIVES[name](dy * up, gate, dgate)
        return out

    return backward


def _triton(name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """Forward and backward."""

    def forward(gate_up: Tensor) -> Tensor:
        from megatronish.kernels.triton import gated

        out: Tensor = getattr(gated, name)(gate_up)
        return out

    def backward(dy: Tensor, gate_up: Tensor) -> Tensor:
        from megatronish.kernels.triton import gated

        grad: Tensor = getattr(gated, f"{name}_backward")(dy, gate_up)
        return grad if gate_up.is_contiguous() else torch.empty_like(gate_up).copy_(grad)

    return forward, backward


def _op(name: str) -> Callable[[Tensor], Tensor]:
    """Registers forward and backward; the differentiable function."""
    forward, backward = (Implementation(run, _refuses_triton) for run in _triton(name))
    forward_op = register(f"{name}(Tensor gate_up) -> Tensor", _reference(name), _forward_fake, also={"triton": forward})
    schema = f"{name}_backward(Tensor dy, Tensor gate_up) -> Tensor"
    backward_op = register(schema, _backward(name), _backward_fake, also={"triton": backward}, choice=name, keyed_by=_by_projection)

    class Gated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate_up: Tensor) -> Tensor:
            ctx.save_for_backward(gate_up)
            return forward_op(gate_up)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return backward_op(dy, *ctx.saved_tensors)

    return Gated.apply


swiglu_reference, geglu_reference = _reference("swiglu"), _reference("geglu")
"""Plain PyTorch, in the input's dtype."""
_swiglu, _geglu = _op("swiglu"), _op("geglu")


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [..., 2F] -> [..., F], any floating dtype; the gate is the first half. Saves its input."""
    return _swiglu(gate_up)


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, likewise."""
    return _geglu(gate_up)


def sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Tensor]]:
    """Inputs that tests and benches run every implementation on."""
    generator = torch.Generator(device).manual_seed(0)
    return [(torch.randn(*s, generator=generator, dtype=dtype, device=device) * 3,) for s in [(4, 2, 32), (1, 1, 2), (7, 3, 86)]]
