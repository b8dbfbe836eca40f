"""Triton's norms, in its interpreter, against float64: rows of any length, extreme values, fused residual, twice the same bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatronish.kernels.layer_norm import layer_norm
from megatronish.kernels.layer_norm import reference as layer_norm_reference
from megatronish.kernels.registry import choosing
from megatronish.kernels.rms_norm import reference as rms_norm_reference
from megatronish.kernels.rms_norm import rms_norm
from megatronish.kernels.table import KERNELS

norms = pytest.importorskip("megatronish.kernels.triton.norms", reason="triton is not installed")
# bfloat16 is wrong in the interpreter. Roundings to the dtype: x / rms (or the residual's sum), the result; dx once.
ROUNDINGS = {torch.float64: 0, torch.float32: 0, torch.float16: 2}


def limit(dtype: torch.dtype, length: int) -> float:
    """Roundings to the dtype, and a sum of `length` terms in the accumulation dtype, in which some cancel (a factor of 8)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return ROUNDINGS[dtype] * torch.finfo(dtype).eps / 2 + 8 * length**0.5 * torch.finfo(wide).eps / 2


def assert_near(got: Tensor, expected: Tensor, allowed: float, what: str) -> None:
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp_min(1.0)
    assert error <= allowed, f"{what} is off by {float(error):.1e}, allowed {allowed:.1e}"


def check(shape: tuple[int, ...], dtype: torch.dtype, *, center: bool, residual: bool, size: float = 1.0, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*of: int) -> Tensor:
        return torch.randn(*of, generator=generator).to(dtype)

    x, dy, weight, bias = draw(*shape) * size, draw(*shape), draw(shape[-1]), draw(shape[-1])
    added, dsum = (draw(*shape), draw(*shape)) if residual else (None, None)
    y, total, rstd, mean = norms.norm_forward(x, weight, bias if center else None, 1e-5, added)
    # What is normalised is the sum as it was rounded.
    expected_total = x if added is None else (x.double() + added.double()).to(dtype)
    assert torch.equal(total, expected_total)
    leaves = [t.double().requires_grad_() for t in ((total, weight, bias) if center else (total, weight))]
    reference = layer_norm_reference if center else rms_norm_reference
    exact = reference(*leaves, 1e-5)
    gradients = list(torch.autograd.grad(exact, leaves, dy.double()))
    if dsum is not None:
        gradients[0] = gradients[0] + dsum.double()
    got = norms.norm_backward(dy, total, weight, rstd, mean, dsum)
    allowed = limit(dtype, max(shape[-1], 8))
    assert_near(y, exact, allowed, "y")
    for name, a, b in zip(("dx", "dweight", "dbias"), got, gradients, strict=False):
        assert_near(a, b, limit(dtype, shape[-1] + 2 * x[..., 0].numel()), name)
    again = norms.norm_backward(dy, total, weight, rstd, mean, dsum)
    assert torch.equal(norms.norm_forward(x, weight, bias if center else None, 1e-5, added)[0], y)
    assert all(a is b or torch.equal(a, b) for a, b in zip(got, again, strict=True))


@settings(max_examples=12)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 300),
    dtype=st.sampled_from(list(ROUNDINGS)),
    center=st.booleans(),
    residual=st.booleans(),
    seed=st.integers(0, 99),
)
def test_norms_and_their_gradients_equal_the_reference_in_float64(
    rows: int, columns: int, dtype: torch.dtype, center: bool, residual: bool, seed: int
) -> None:
    check((rows, columns), dtype, center=center, residual=residual, seed=seed)


@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("columns", [norms.WHOLE_BACKWARD + 8, norms.WHOLE + 3])
def test_rows_that_are_read_in_chunks(columns: int, center: bool) -> None:
    check((2, columns), torch.float32, center=center, residual=True)


@pytest.mark.parametrize("size", [1e-12, 1e4, 1e15])
def test_extreme_values_stay_finite_and_right(size: float) -> None:
    check((3, 40), torch.float32, center=False, residual=False, size=size)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0, 8)])
def test_no_rows_give_no_rows_and_zero_gradients(shape: tuple[int, ...]) -> None:
    x, weight = torch.empty(shape), torch.ones(8)
    y, _, rstd, mean = norms.norm_forward(x, weight, weight, 1e-5)
    dx, dweight, dbias = norms.norm_backward(y, x, weight, rstd, mean)
    assert y.shape == dx.shape == shape and not dweight.any() and not dbias.any()


@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
def test_the_op_that_adds_first_gives_the_same_in_triton(center: bool) -> None:
    kernel = KERNELS["add_layer_norm" if center else "add_rms_norm"]
    for arguments in kernel.sample_inputs(torch.float64, "cpu"):
        results = []
        for name in ("torch", "triton"):
            # Strided: every second element.
            leaves = [a.repeat_interleave(2, -1)[..., ::2].requires_grad_() for a in arguments if isinstance(a, Tensor)]
            with choosing({kernel.name: name}):
                y, total = kernel.function(*leaves, arguments[-1])
                results.append([y.detach(), total.detach(), *torch.autograd.grad((y, total), leaves, (y.cos(), total.sin()))])
        for a, b in zip(*results, strict=True):
            assert_near(a, b, limit(torch.float64, arguments[0].shape[-1]), "a result")


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
def test_the_op_gives_the_same_through_any_body_of_strided_inputs_too(center: bool, name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(5, 24, 3, generator=generator, dtype=torch.float64)
    x = base.transpose(1, 2)
    parameters = [torch.randn(24, generator=generator, dtype=torch.float64) for _ in range(1 + center)]
    function = layer_norm if center else rms_norm
    results = []
    for forced in ({}, {"rms_norm": name, "layer_norm": name}):
        leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
        with choosing(forced):
            y = function(*leaves, 1e-5)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, y.detach().cos())])
    for a, b in zip(*results, strict=True):
        assert_near(a, b, limit(torch.float64, 24), "a result")
