"""Attention within documents and with dropout: small parts at a time, documents one by one, any cut of heads and samples."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatronish.kernels import masked_attention as kernel
from megatronish.kernels.attention import attention
from megatronish.kernels.masked_attention import WeightDropout, masked_attention


def inputs(S: int = 19, B: int = 2, H: int = 6, G: int = 3, K: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(S, B, n, K, generator=generator, dtype=torch.float64, requires_grad=True) for n in (H, G, G))
    return q, k, v


def with_gradients(given: tuple[Tensor, ...], out: Tensor, upstream: Tensor | None = None) -> list[Tensor]:
    upstream = torch.arange(out.numel(), dtype=torch.float64).view(out.shape).cos() if upstream is None else upstream
    return [out, *torch.autograd.grad(out, given, upstream)]


def assert_all_close(got: list[Tensor], expected: list[Tensor]) -> None:
    # float64, sums of at most a few hundred terms in another order.
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 13, [0] * 19]).t()


def test_without_masks_it_is_causal_attention() -> None:
    given = inputs()
    assert_all_close(
        with_gradients(given, masked_attention(*given, documents_SB=None, drop=None)), with_gradients(given, attention(*given))
    )


def test_documents_of_a_sample_equal_each_by_itself() -> None:
    q, k, v = given = inputs()
    whole = with_gradients(given, masked_attention(*given, documents_SB=DOCUMENTS, drop=None))
    upstream = torch.arange(q.numel(), dtype=torch.float64).view(q.shape).cos()
    for column, bounds in ((0, [(0, 5), (5, 6), (6, 19)]), (1, [(0, 19)])):
        for start, stop in bounds:
            part = (slice(start, stop), slice(column, column + 1))
            alone = tuple(x.detach()[part].requires_grad_() for x in (q, k, v))
            assert_all_close([x[part] for x in whole], with_gradients(alone, attention(*alone), upstream[part]))


@pytest.mark.parametrize("scores", [1, 19, 2 * 19 * 4, 2 * 19 * 19, 6 * 19 * 19])
def test_the_number_of_scores_at_a_time_changes_nothing(scores: int) -> None:
    given, drop = inputs(), WeightDropout(torch.tensor([4, 10**12]), first_head=6, key=3, rate=0.2)
    expected = with_gradients(given, masked_attention(*given, documents_SB=DOCUMENTS, drop=drop))
    with patch.object(kernel, "_SCORES", scores):
        assert_all_close(with_gradients(given, masked_attention(*given, documents_SB=DOCUMENTS, drop=drop)), expected)


def test_a_cut_of_heads_or_samples_drops_the_same_weights() -> None:
    given, samples = inputs(), torch.tensor([4, 7])
    whole = masked_attention(*given, documents_SB=None, drop=WeightDropout(samples, first_head=0, key=3, rate=0.5))
    for rank in range(3):
        part = tuple(x.tensor_split(3, 2)[rank] for x in given)
        got = masked_attention(*part, documents_SB=None, drop=WeightDropout(samples, first_head=2 * rank, key=3, rate=0.5))
        torch.testing.assert_close(got, whole[:, :, 2 * rank : 2 * rank + 2])
    part = tuple(x[:, 1:] for x in given)
    got = masked_attention(*part, documents_SB=None, drop=WeightDropout(samples[1:], first_head=0, key=3, rate=0.5))
    torch.testing.assert_close(got, whole[:, 1:])


def test_numbers_agree_with_finite_differences() -> None:
    given, drop = inputs(S=5, H=2, G=1, K=4), WeightDropout(torch.tensor([0, 1]), first_head=0, key=11, rate=0.3)

    def function(*given: Any) -> Tensor:
        return masked_attention(*given, documents_SB=torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]).t(), drop=drop)

    assert torch.autograd.gradcheck(function, given)
