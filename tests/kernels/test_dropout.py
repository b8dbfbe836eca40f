"""Dropout: bits that no cut changes, the right rate, independent sites, samples and elements; the gradient is mask / (1 - rate)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatronish import native
from megatronish.comm import random
from megatronish.comm.random import stream_key
from megatronish.kernels.dropout import dropout, keep_bits

KEY = stream_key(7, "dropout", "layers.3.mlp_dropout")


def drawn(shape: tuple[int, ...], samples: torch.Tensor, *, batch_dim: int = 1, first: int = 0, rate: float = 0.3) -> torch.Tensor:
    return dropout(torch.ones(shape, dtype=torch.float64), samples, batch_dim=batch_dim, first=first, key=KEY, rate=rate)


@given(st.data())
def test_any_cut_of_the_leading_dimension_and_of_the_samples_keeps_the_same_elements(data: st.DataObject) -> None:
    S, B, D = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    samples = torch.tensor(data.draw(st.lists(st.integers(0, 2**62), min_size=B, max_size=B)))
    whole = drawn((S, B, D), samples)
    cuts = sorted({0, S, *data.draw(st.lists(st.integers(0, S), max_size=3))})
    parts = [drawn((stop - start, B, D), samples, first=start) for start, stop in pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)
    for column in range(B):  # a microbatch of one, and in another place of it
        assert torch.equal(drawn((S, 1, D), samples[column : column + 1]), whole[:, column : column + 1])
    assert torch.equal(drawn((S, B, D), samples.flip(0)), whole.flip(1))


def test_heads_are_cut_like_the_sequence() -> None:
    samples = torch.tensor([5, 2**40])
    whole = drawn((2, 6, 7, 7), samples, batch_dim=0)
    assert torch.equal(torch.cat([drawn((2, 2, 7, 7), samples, batch_dim=0, first=head) for head in (0, 2, 4)], 1), whole)


def test_a_draw_larger_than_a_chunk_equals_its_parts() -> None:
    samples, count = torch.arange(3), 200_000
    whole = keep_bits(samples, start=0, count=count, key=KEY, rate=0.5)
    parts = [keep_bits(samples, start=a, count=b - a, key=KEY, rate=0.5) for a, b in pairwise([0, 1, 65_537, 131_074, count])]
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.skipif(not hasattr(native.cpu, "keep_bits"), reason="native module not built")
@given(
    samples=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=3),
    start=st.integers(0, 2**40),
    count=st.integers(1, 200),
    key=st.integers(-(2**63), 2**63 - 1),
    rate=st.sampled_from([0.0, 1e-9, 0.1, 0.5, 1 - 1e-12]),
)
def test_native_bits_equal_those_of_torch(samples: list[int], start: int, count: int, key: int, rate: float) -> None:
    numbers = {"start": start, "count": count, "key": key, "rate": rate}
    assert torch.equal(keep_bits(torch.tensor(samples), **numbers), random.keep_bits(torch.tensor(samples), **numbers))


@pytest.mark.parametrize("threads", [1, 3])
def test_native_bits_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    samples, before = torch.tensor([3, 2**33]), torch.get_num_threads()
    expected = random.keep_bits(samples, start=7, count=300_001, key=KEY, rate=0.2)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(keep_bits(samples, start=7, count=300_001, key=KEY, rate=0.2), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.5, 0.97])
def test_the_share_of_dropped_elements_is_the_rate(rate: float) -> None:
    count = 1 << 18
    dropped = keep_bits(torch.arange(4), start=3, count=count, key=KEY, rate=rate).logical_not().double()
    # Standard error of the mean of n draws: sqrt(p (1 - p) / n); five of them. Each of the four words of a block by itself, too.
    for share in (dropped.mean(), *(dropped[:, word::4].mean() for word in range(4))):
        assert abs(float(share) - rate) <= 5 * math.sqrt(rate * (1 - rate) / count)


def test_sites_samples_and_neighbours_are_independent() -> None:
    count, p = 1 << 16, 0.5
    bits = keep_bits(torch.tensor([0, 1, 2**32]), start=0, count=count, key=KEY, rate=p).double() - 0.5
    site = stream_key(7, "dropout", "layers.4.mlp_dropout")
    other = keep_bits(torch.tensor([0]), start=0, count=count, key=site, rate=p).double() - 0.5
    pairs = [(bits[0], bits[1]), (bits[0], bits[2]), (bits[0], other[0])]
    pairs += [(bits[0, :-lag], bits[0, lag:]) for lag in (1, 2, 3, 4)]
    for a, b in pairs:  # correlation of n pairs of fair bits: standard error 1 / sqrt(n)
        assert abs(float((a * b).mean() * 4)) < 5 / math.sqrt(count - 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_gradient_is_the_mask_over_one_minus_the_rate(dtype: torch.dtype) -> None:
    samples = torch.tensor([3, 9])
    x = torch.randn(5, 2, 8, dtype=dtype, requires_grad=True)
    y = dropout(x, samples, batch_dim=1, first=2, key=KEY, rate=0.25)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    expected = keep_bits(samples, start=2 * 8, count=5 * 8, key=KEY, rate=0.25).view(2, 5, 8).transpose(0, 1).to(dtype) / 0.75
    assert 0 < int((dx == 0).sum()) < dx.numel()
    torch.testing.assert_close(dx, expected, rtol=0, atol=0 if dtype == torch.bfloat16 else 1e-15)
    torch.testing.assert_close(y, x * expected)


def test_numbers_agree_with_finite_differences() -> None:
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropout(x, torch.tensor([1, 2]), batch_dim=1, first=1, key=KEY, rate=0.4), (x,))
