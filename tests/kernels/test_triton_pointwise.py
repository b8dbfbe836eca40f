"""Rotary embedding, gated activations, GELU with what surrounds it, in Triton under its interpreter, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatronish.kernels import dropout, gelu
from megatronish.kernels.table import KERNELS

pytest.importorskip("triton", reason="triton is not installed")
from megatronish.kernels.registry import choosing
from megatronish.kernels.triton import gelu as fused
from megatronish.kernels.triton import rotary as turned

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def assert_close(got: Tensor, expected: Tensor, *, roundings: int = 1) -> None:
    """Some ten operations of float32 on values whose largest is that of the tensor, and `roundings` to its dtype."""
    limit = roundings * torch.finfo(got.dtype).eps / 2 + 16 * torch.finfo(torch.float32).eps
    assert (got.double() - expected).abs().max() <= limit * expected.abs().max()


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def widened(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) else a for a in arguments)


@pytest.mark.parametrize("name", ["swiglu", "geglu", "gelu", "split_rotary"])
@dtypes
def test_an_op_run_in_triton_equals_its_reference_gradients_too(name: str, dtype: torch.dtype) -> None:
    kernel = KERNELS[name]
    for arguments in kernel.sample_inputs(dtype, "cpu"):
        results: list[tuple[Tensor, ...]] = []
        for function, given in ((kernel.function, arguments), (kernel.reference, widened(arguments))):
            # Every second element of twice as many: not contiguous.
            x = given[0].detach().repeat_interleave(2, -1)[..., ::2].requires_grad_()
            with choosing({name: "triton"}):
                out: Any = function(x, *given[1:])
                outputs = (out,) if isinstance(out, Tensor) else out
                upstream = [draw(*o.shape, dtype=dtype, seed=number).to(o.dtype) for number, o in enumerate(outputs)]
                (dx,) = torch.autograd.grad(outputs, x, upstream)
            results.append((*(o.detach() for o in outputs), dx))
        for got, expected in zip(*results, strict=True):
            assert_close(got, expected)


@dtypes
def test_bias_gelu_dropout_add_run_in_triton_equals_its_reference_gradients_too(dtype: torch.dtype) -> None:
    kernel = KERNELS["bias_gelu_dropout_add"]
    for arguments in kernel.sample_inputs(dtype, "cpu"):
        results: list[list[Tensor]] = []
        for function, given in ((kernel.function, arguments), (kernel.reference, on_parts(arguments, Tensor.double))):
            given = on_parts(given, lambda a: a.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_())
            with choosing({kernel.name: "triton"}):
                out: Any = function(*given)
                dy = draw(*out.shape, dtype=dtype, seed=7).to(out.dtype)
                results.append([out.detach(), *torch.autograd.grad(out, [a for a in given[:3] if a is not None], dy)])
        for got, expected in zip(*results, strict=True):
            assert_close(got, expected)


def on_parts(arguments: tuple[Any, ...], function: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """With `function` of x, bias and residual, where given."""
    return (*(None if a is None else function(a) for a in arguments[:3]), *arguments[3:])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("K", "R"), [(16, 16), (20, 12), (24, 2)])
def test_rotary_turns_pairs_of_either_layout_and_leaves_the_rest(K: int, R: int, interleaved: bool) -> None:
    S, B, G, q = 3, 2, 2, 3
    qkv = draw(S, B, G, q + 2, K, dtype=torch.float32)
    angle = draw(S, B, 1, R // 2, dtype=torch.float32, seed=1)
    cos, sin = angle.cos(), angle.sin()
    # The truth: complex numbers.
    wide = qkv.double()
    first, second = (wide[..., 0:R:2], wide[..., 1:R:2]) if interleaved else (wide[..., : R // 2], wide[..., R // 2 : R])
    by = torch.complex(cos.double(), sin.double())[:, :, :, None]
    pairs = torch.complex(first, second) * by
    parts = torch.stack((pairs.real, pairs.imag), -1).flatten(-2) if interleaved else torch.cat((pairs.real, pairs.imag), -1)
    expected = torch.cat((parts, wide[..., R:]), -1)
    query, key, value = turned.forward(qkv, cos, sin, interleaved)
    assert_close(query, expected[..., :q, :].flatten(2, 3))
    assert_close(key, expected[..., q, :])
    assert torch.equal(value, qkv[..., q + 1, :])
    # A rotation is orthogonal: its backward undoes it.
    assert_close(turned.backward(query, key, value, cos, sin, interleaved), wide)


@pytest.mark.parametrize("use_gelu", [False, True])
@pytest.mark.parametrize(("D", "first", "has_bias"), [(1028, 5, True), (7, 3, False), (8, 0, True)])
def test_bias_gelu_dropout_add_draws_the_bits_of_dropout_and_equals_autograd(
    D: int, first: int, has_bias: bool, use_gelu: bool
) -> None:
    S, B, key, rate = 5, 2, -(2**61) + 9, 0.3
    x, residual = draw(S, B, D, dtype=torch.float32), draw(S, B, D, dtype=torch.float32, seed=1)
    dy, bias = draw(S, B, D, dtype=torch.float32, seed=2), draw(D, dtype=torch.float32, seed=3) if has_bias else None
    samples_B = torch.tensor([3, 6_000_000_001])
    wide = x.double().requires_grad_()
    wide_bias = (torch.zeros(D) if bias is None else bias).double().requires_grad_()
    inner = wide + wide_bias
    value = gelu.reference(inner) if use_gelu else inner
    expected = residual.double() + dropout.reference(value, samples_B, 1, first, key, rate)
    dx, dbias = torch.autograd.grad(expected, (wide, wide_bias), dy.double())
    assert_close(fused.forward(x, bias, residual, samples_B, use_gelu, first, key, rate), expected.detach())
    got_dx, got_dbias = fused.backward(dy, x, bias, samples_B, use_gelu, first, key, rate)
    assert_close(got_dx, dx)
    if bias is None:
        assert got_dbias.numel() == 0
    else:
        assert_close(got_dbias, dbias)
