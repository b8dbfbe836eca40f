"""Cross entropy in Triton, under its interpreter, against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatronish.kernels import cross_entropy as op

pytest.importorskip("triton", reason="triton is not installed")
from megatronish.kernels.triton import cross_entropy as ours

V = 9001
"""More than one block of either kernel, and a ragged end."""


def assert_close(got: Tensor, expected: Tensor, *, roundings: int, dtype: torch.dtype = torch.float32) -> None:
    """Relative to the largest element: exp and sums in float32, then `roundings` to dtype. What is not finite must be the same."""
    finite = expected.isfinite()
    assert torch.equal(got.double()[~finite], expected[~finite])
    # An exponential of float32 is good to 2 units for arguments up to some 20, whose own rounding it multiplies by 20.
    limit = roundings * torch.finfo(dtype).eps / 2 + 32 * torch.finfo(torch.float32).eps
    # Below its smallest normal number float16 is spaced evenly.
    spacing = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    if finite.any():
        assert (got.double() - expected)[finite].abs().max() <= limit * expected[finite].abs().max() + spacing / 2


# The interpreter is slow: no shrinking.
@settings(max_examples=5, phases=[Phase.explicit, Phase.generate])
@given(
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    columns=st.sampled_from([1, 33, 4097, V]),
    valid_share=st.sampled_from([1.0, 0.6, 0.0]),
    first_row=st.sampled_from([0, 700]),
    with_sum=st.booleans(),
    row_gap=st.sampled_from([0, 5]),
    terms=st.sampled_from([(1.0, 0.0, 0.0), (0.9, 0.1 / V, 0.01)]),
)
@example(0, torch.float32, V, 1.0, 0, True, 5, (0.9, 0.1 / V, 0.01))
@example(1, torch.float32, 4097, 0.0, 700, True, 0, (1.0, 0.0, 0.0))
def test_parts_and_gradient_equal_the_reference(
    seed: int,
    dtype: torch.dtype,
    columns: int,
    valid_share: float,
    first_row: int,
    with_sum: bool,
    row_gap: int,
    terms: tuple[float, float, float],
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_valid = round(columns * valid_share)
    logits = (torch.randn(4, columns + row_gap, generator=generator) * 4).to(dtype)[:, :columns]
    logits[1, : columns // 2] = -math.inf
    logits[2] = -math.inf
    logits[3, 0] = 60000.0
    # Of this rank, of others, and a mark of "no label".
    labels = torch.tensor([first_row, first_row + max(0, num_valid - 1), -100, first_row + columns])
    got = ours.forward(logits, labels, first_row, num_valid, with_sum)
    expected = op.reference(logits.double(), labels, first_row, num_valid, with_sum)
    for row, exact in zip(got, expected, strict=True):
        assert_close(row, exact, roundings=0)

    logits[2] = 0.0  # a row of nothing but -inf has no gradient
    log_sum_exp = logits.double().logsumexp(-1) + torch.rand(4, generator=generator)
    dloss = torch.rand(4, generator=generator)
    exact = op.reference_backward(dloss.double(), logits.double(), labels, log_sum_exp, first_row, num_valid, *terms)
    apart = torch.full_like(logits, math.nan)
    ours.backward(dloss, logits, labels, log_sum_exp.float(), apart, first_row, num_valid, *terms)
    for token in range(3):
        assert_close(apart[token], exact[token], roundings=1, dtype=dtype)
    # 60000 in float32 is good to 0.004: so is the exponent there.
    assert (apart[3].double() - exact[3]).abs().max() < 0.01 * exact[3].abs().max().clamp_min(1e-30)
    in_place = logits.clone()
    ours.backward(dloss, in_place, labels, log_sum_exp.float(), in_place, first_row, num_valid, *terms)
    assert torch.equal(in_place, apart)


def test_no_tokens_are_no_work() -> None:
    nothing, labels = torch.empty(0, 7), torch.empty(0, dtype=torch.int64)
    assert ours.forward(nothing, labels, 0, 7).shape == (3, 0)
    ours.backward(torch.empty(0), nothing, labels, torch.empty(0), nothing, 0, 7)
