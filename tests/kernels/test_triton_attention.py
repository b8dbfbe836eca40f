"""Triton's attention, in its interpreter, against float64: every mask, odd sizes, queries that see nothing, the same bits twice."""

from __future__ import annotations

import math
import mmap
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatronish.kernels.attention import attention
from megatronish.kernels.masked_attention import WeightDropout, attend, reference
from megatronish.kernels.registry import choosing

kernels = pytest.importorskip("megatronish.kernels.triton.attention", reason="triton is not installed")
# float16: weights are rounded before they meet the values, scores' gradients before keys and queries, the output and each gradient
# at the end, and backward starts from an output that was rounded. Sums of up to 100 terms in float32; some cancel: a factor 8.
MAP_NORESERVE = 0x4000
LIMIT = {torch.float32: 8 * 100**0.5 * 2.0**-24, torch.float16: 6 * 2.0**-11}


def inputs(S: int, T: int, B: int, H: int, G: int, K: int, dtype: torch.dtype, seed: int = 0, size: float = 1.0) -> list[Tensor]:
    """query, key, value, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(S, B, H, K), (T, B, G, K), (T, B, G, K), (S, B, H, K)]
    q, k, v, dout = (torch.randn(*shape, generator=generator) for shape in shapes)
    return [x.to(dtype) for x in (q * size, k * size, v, dout)]


def results(given: list[Tensor], masks: dict[str, Any], *, exact: bool) -> list[Tensor]:
    """Output, log-sum-exp and the three gradients: of Triton's body, or in float64 of the reference."""
    *qkv, dout = given
    leaves = [(x.double() if exact else x).detach().requires_grad_() for x in qkv]
    with choosing({"attention": "reference" if exact else "triton"}):
        out, lse = attend(*leaves, **masks)
        return [out.detach(), lse, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def check(given: list[Tensor], **masks: Any) -> None:
    got, expected, limit = results(given, masks, exact=False), results(given, masks, exact=True), LIMIT[given[0].dtype]
    assert got[1].dtype == torch.float32
    for name, a, b in zip(("out", "lse", "dquery", "dkey", "dvalue"), got, expected, strict=True):
        seen = b.isfinite()
        assert torch.equal(a.isfinite(), seen), name
        error = (a.double() - b)[seen].abs().max() / b[seen].abs().max().clamp_min(1.0)
        assert error <= limit, f"{name} is off by {float(error):.1e}, allowed {limit:.1e}"
    assert all(torch.equal(a, b) for a, b in zip(got, results(given, masks, exact=False), strict=True))


def test_the_reference_is_softmax() -> None:
    q, k, v, _ = (x.double() for x in inputs(7, 7, 1, 2, 2, 8, torch.float32))
    out, lse = reference(q, k, v, None, None, None, 0, 0, 0.0, 8**-0.5, True, 0)
    torch.testing.assert_close(out, attention(q, k, v))
    torch.testing.assert_close(lse[0, :, 0], torch.einsum("hk,hk->h", q[0, 0], k[0, 0]) * 8**-0.5)


@settings(max_examples=8)
@given(
    S=st.integers(1, 70),
    T=st.integers(1, 70),
    heads=st.sampled_from([(2, 2), (4, 2), (2, 1)]),
    K=st.sampled_from([8, 24, 80]),
    dtype=st.sampled_from(list(LIMIT)),
    causal=st.booleans(),
    window=st.sampled_from([0, 1, 13]),
    scale=st.sampled_from([None, 0.3]),
)
def test_any_numbers_of_queries_and_keys(
    S: int, T: int, heads: tuple[int, int], K: int, dtype: torch.dtype, causal: bool, window: int, scale: float | None
) -> None:
    check(inputs(S, T, 1, *heads, K, dtype), causal=causal, window=window, scale=scale)


@pytest.mark.parametrize("dtype", LIMIT, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_documents_dropout_and_alibi_together(dtype: torch.dtype) -> None:
    documents = torch.randint(3, (35, 2), generator=torch.Generator().manual_seed(1)).sort(0).values
    drop = WeightDropout(torch.tensor([41, 3_000_000_001 * 5]), first_head=8, key=-99, rate=0.3)
    slopes = torch.tensor([0.5, 0.125])
    check(inputs(35, 35, 2, 2, 1, 16, dtype), documents_SB=documents, slopes_H=slopes, drop=drop)
    if dtype == torch.float32:
        check(inputs(35, 40, 1, 2, 1, 16, dtype), drop=WeightDropout(drop.samples_B[1:], 0, 7, 0.3), window=9)


def test_several_blocks_of_queries_and_keys() -> None:
    check(inputs(200, 200, 1, 1, 1, 8, torch.float32))
    check(inputs(150, 150, 1, 1, 1, 16, torch.float32), window=20)


def test_queries_that_see_nothing_get_zero_and_minus_infinity() -> None:
    given = inputs(40, 33, 1, 2, 1, 16, torch.float32)
    out, lse, dquery, *_ = results(given, {}, exact=False)
    assert not out[:7].any() and not dquery[:7].any() and lse[..., :7].eq(-math.inf).all() and lse[..., 7:].isfinite().all()
    check(given)


def test_scores_of_thousands_neither_overflow_nor_lose_the_largest() -> None:
    q, k, v, dout = inputs(20, 20, 1, 1, 1, 16, torch.float32, size=30.0)
    out, lse, *gradients = results([q, k, v, dout], {}, exact=False)
    exact = results([q, k, v, dout], {}, exact=True)
    assert all(x.isfinite().all() for x in (out, lse, *gradients))
    # Scores of some 3,000 are rounded to float32 before exp: an absolute error of 3,000 x 2^-23, so a relative one of each weight.
    torch.testing.assert_close(out.double(), exact[0], rtol=0, atol=4 * 3000 * 2.0**-23)


def test_inputs_cut_out_of_a_packed_projection_are_taken_as_they_are() -> None:
    packed = torch.randn(33, 1, 2, 4, 16, generator=torch.Generator().manual_seed(0))
    query, key, value = packed[..., :2, :].flatten(2, 3), packed[..., 2, :], packed[..., 3, :]
    assert not key.is_contiguous()
    check([query, key, value, torch.ones(33, 1, 4, 16)])


def test_heads_may_stand_more_than_2_to_the_31_elements_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    # 12 GiB of addresses, of which a few pages are touched: a product of 32 bits would end before the middle, at zeros. The kernels
    # get tensors that begin there and own a little, since the interpreter copies all that a tensor's storage holds.
    step, dout = 2**30, inputs(3, 3, 1, 3, 3, 8, torch.float16)[3]
    plain, masks, tiles = inputs(3, 3, 1, 3, 3, 8, torch.float16)[:3], kernels.Masks(), kernels._FLOAT32
    pages = mmap.mmap(-1, 6 * step * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    memory = torch.frombuffer(pages, dtype=torch.float16)
    places = [3 * step + 64 * i for i in range(3)]
    apart = [memory[place:].as_strided(x.shape, (8, 0, step, 1)) for place, x in zip(places, plain, strict=True)]
    for far, x in zip(apart, plain, strict=True):
        far.copy_(x)
    near = tuple(torch.frombuffer(pages, dtype=torch.float16, count=24, offset=2 * place) for place in places)
    common = kernels._common

    def without_storage(*given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        arguments, flags = common(*given)
        return arguments | dict.fromkeys(("documents_ptr", "slopes_ptr", "samples_ptr"), dout), flags

    monkeypatch.setattr(kernels, "_common", without_storage)
    out, lse = kernels.launch_forward(near, *apart, masks, 0.3, tile=tiles.forward, tma=0)
    gradients = kernels.launch_backward(lambda _: (dout, *near), dout, *apart, out, lse, masks, 0.3, tiles=tiles, tma=0)
    want_out, want_lse = kernels.forward(*plain, masks, 0.3)
    want = (want_out, want_lse, *kernels.backward(dout, *plain, want_out, want_lse, masks, 0.3))
    assert all(torch.equal(a, b) for a, b in zip((out, lse, *gradients), want, strict=True))


def test_what_it_cannot_do_it_refuses_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = inputs(4, 4, 1, 1, 1, 12, torch.float32)
    assert "multiples of 8" in kernels.refuses(q, k, v, kernels.Masks())
    assert "float64" in kernels.refuses(*(x.double() for x in (q, k, v)), kernels.Masks())
    wide = torch.empty(1, 1, 1, 8).expand(1, 2**12, 16, 8)
    assert "4096 samples of 16 heads" in kernels.refuses(wide, wide, wide, kernels.Masks())
    assert kernels.refuses(*(x[:, 1:] for x in (wide, wide, wide)), kernels.Masks()) is None
    monkeypatch.setattr(kernels, "architecture", lambda: 89)
    large, small = (torch.zeros(1, 1, 1, K, dtype=torch.bfloat16) for K in (256, 128))
    assert "101376 bytes of shared memory" in kernels.refuses(large, large, large, kernels.Masks())
    assert kernels.refuses(small, small, small, kernels.Masks()) is None
    of = {a: kernels.tiles_for(128, torch.bfloat16, masks=kernels.Masks(), architecture=a) for a in (80, 89, 120)}
    assert of[80] == of[89] == of[120]
    with choosing({"attention": "triton"}), pytest.raises(ValueError, match=r"kernels.attention=triton.*multiples of 8.*set it to"):
        attention(q, k, v)
