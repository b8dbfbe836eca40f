"""Attention through tensor descriptors, in Triton's interpreter, against float64, as Hopper and as Blackwell would run it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatronish.kernels.attention import attention
from megatronish.kernels.masked_attention import attend
from megatronish.kernels.registry import choosing
from tests.kernels.test_triton_attention import LIMIT, inputs

kernels = pytest.importorskip("megatronish.kernels.triton.attention_tma", reason="triton is not installed")
HALF, FLOAT = torch.float16, torch.float32


@pytest.fixture(params=[90, 100], ids=["hopper", "blackwell"])
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "architecture", lambda: request.param)


def results(given: list[Tensor], masks: dict[str, Any], body: str) -> list[Tensor]:
    *qkv, dout = given
    leaves = [(x.double() if body == "reference" else x).detach().requires_grad_() for x in qkv]
    with choosing({"attention": body}):
        out, lse = attend(*leaves, **masks)
        return [out.detach(), lse, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def check(given: list[Tensor], **masks: Any) -> None:
    got, expected, limit = results(given, masks, "triton-tma"), results(given, masks, "reference"), LIMIT[given[0].dtype]
    for name, a, b in zip(("out", "lse", "dquery", "dkey", "dvalue"), got, expected, strict=True):
        seen = b.isfinite()
        assert torch.equal(a.isfinite(), seen), name
        error = (a.double() - b)[seen].abs().max() / b[seen].abs().max().clamp_min(1.0)
        assert error <= limit, f"{name} is off by {float(error):.1e}, allowed {limit:.1e}"


@pytest.mark.usefixtures("architecture")
@pytest.mark.parametrize(
    ("S", "T", "heads", "K", "dtype", "masks"),
    [
        (45, 45, (2, 1), 64, HALF, {}),
        (70, 70, (1, 1), 16, FLOAT, {}),
        (13, 50, (2, 1), 24, FLOAT, {"window": 9}),
        (33, 20, (2, 2), 16, FLOAT, {"causal": False, "scale": -0.3}),
        (40, 33, (1, 1), 16, FLOAT, {"slopes_H": torch.tensor([0.5])}),
        (3, 3, (1, 1), 128, HALF, {}),
    ],
    ids=["grouped", "tiles", "window-fewer-queries", "full-fewer-keys", "alibi-empty-rows", "wide"],
)
def test_results_and_gradients_equal_float64(
    S: int, T: int, heads: tuple[int, int], K: int, dtype: torch.dtype, masks: dict[str, Any]
) -> None:
    check(inputs(S, T, 1, *heads, K, dtype), **masks)


def test_a_tile_takes_nothing_of_the_next_sample_and_of_heads_that_stand_beside_it() -> None:
    # Heads are cut out of a packed projection; rows past the end, of the same memory, are NaN.
    packed = torch.randn(40, 2, 4, 16, generator=torch.Generator().manual_seed(0))
    packed[33:] = torch.nan
    query, key, value = packed[:33, ..., :2, :], packed[:33, ..., 2:3, :], packed[:33, ..., 3:, :]
    assert not key.is_contiguous()
    check([query, key, value, torch.ones(33, 2, 2, 16)])


def test_an_allocator_that_was_set_before_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import _allocation

    monkeypatch.setattr(kernels, "architecture", lambda: 90)
    before, during = _allocation._allocator.get(), []
    monkeypatch.setattr(kernels.attention, "launch_forward", lambda *_, **__: during.append(_allocation._allocator.get()))
    q, k, v, _ = inputs(4, 4, 1, 1, 1, 16, HALF)

    def own(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8)

    kernels.triton.set_allocator(own)
    try:
        kernels.forward(q, k, v, kernels.Masks(), 0.25)
        assert _allocation._allocator.get() is own
    finally:
        kernels.triton.set_allocator(before)
    assert during and during[0] is not own


def test_what_it_cannot_do_it_refuses_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = inputs(4, 4, 1, 1, 1, 16, FLOAT)
    plain = kernels.Masks()
    assert "documents" in kernels.refuses(q, k, v, kernels.Masks(documents_TB=torch.zeros(4, 1)))
    assert "dropout" in kernels.refuses(q, k, v, kernels.Masks(samples_B=torch.zeros(1)))
    odd = torch.empty(4 * 16 + 1)[1:].view(4, 1, 1, 16)
    assert "aligned" in kernels.refuses(odd, k, v, plain)
    assert "head size 12" in kernels.refuses(*(x[..., :12] for x in (q, k, v)), plain)
    monkeypatch.setattr(kernels, "architecture", lambda: 120)
    assert "99 KiB" in kernels.refuses(q, k, v, plain)
    monkeypatch.setattr(kernels, "architecture", lambda: 80)
    assert "9.0 and up" in kernels.refuses(q, k, v, plain)
    with choosing({"attention": "triton-tma"}), pytest.raises(ValueError, match=r"kernels.attention=triton-tma.*sm_80.*set it to"):
        attention(q, k, v)
    monkeypatch.setattr(kernels, "architecture", lambda: 90)
    monkeypatch.setattr(kernels.triton.knobs.runtime, "interpret", False)
    assert "float32" in kernels.refuses(q, k, v, plain)
