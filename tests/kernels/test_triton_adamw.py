"""Triton's AdamW and square sum, in its interpreter, against the plain PyTorch: every kind of state, odd sizes, refused steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatronish.kernels import adamw, square_sum
from megatronish.kernels.adamw import AdamWNumbers, join_master
from tests.kernels.test_adamw import KINDS, NUMBERS, copy_of, segments_of, state_of, tensors_of

kernels = pytest.importorskip("megatronish.kernels.triton.adamw", reason="triton is not installed")


def run(state: dict[str, Any], rounding: str, segments: torch.Tensor | None, *, scale: float = 0.37) -> None:
    numbers: AdamWNumbers = NUMBERS
    hyper = [numbers.lr, numbers.beta1, numbers.beta2, numbers.eps, numbers.weight_decay]
    tensors = [state[name] for name in ("master", "grad", "exp_avg", "exp_avg_sq")]
    given = (*tensors, torch.tensor([scale, 7.0]), state["low"], hyper, segments, rounding, True)
    assert kernels.refuses(*given) is None
    kernels.forward(*given)


@pytest.mark.parametrize(("master", "moments", "rounding"), KINDS)
def test_a_step_is_the_references(master: str, moments: torch.dtype, rounding: str) -> None:
    n = 2 * kernels.BLOCK + 77
    ours = state_of(n, master, moments, offset=3)
    plain = copy_of(ours)
    segments = segments_of(n) if (master, rounding) != ("float32", "nearest") else None
    run(ours, rounding, segments)
    low = plain.pop("low")
    adamw.reference(*plain.values(), torch.tensor([0.37, 7.0]), low, NUMBERS, segments, rounding, zero_grad=True)  # type: ignore[arg-type]
    assert ours["grad"].eq(0).all()
    if master == "remainder":
        ours["master"], plain["master"] = join_master(ours["low"], ours["master"]), join_master(low, plain["master"])
    for name, expected in tensors_of({**plain, "low": low}).items():
        # Float32: the same operations, but that a constant may be rounded once more (4 units of numbers up to 4). What is then
        # rounded to 16 bits falls on the other neighbour where that decides: in fewer than 1 of 100 elements.
        got, limit = ours[name].double(), 16 * 2.0**-24
        far = (got - expected.double()).abs() > limit
        if expected.dtype == torch.float32:
            assert not far.any(), name
        else:
            assert far.double().mean() < 0.01, name
            assert ((got - expected.double()).abs() <= 2.0**-7 * expected.double().abs() * 1.01 + limit).all(), name


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_refused_step_writes_zeros_to_the_gradient_alone(scale: float) -> None:
    state = state_of(1021, "remainder", torch.bfloat16)
    before = copy_of(state)
    run(state, "stochastic", segments_of(1021), scale=scale)
    assert state["grad"].eq(0).all()
    for name, value in tensors_of(state).items():
        assert name == "grad" or torch.equal(value, before[name]), name


def test_the_square_sum_is_float64_and_twice_the_same_bits() -> None:
    tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (1, 16385, 5000)]
    first, second = kernels.square_sum(tensors), kernels.square_sum(tensors)
    assert torch.equal(first, second)
    assert float(first) == pytest.approx(float(square_sum.reference(tensors)), rel=1e-13)
    assert math.isnan(float(kernels.square_sum([torch.tensor([1.0, math.nan])])))
