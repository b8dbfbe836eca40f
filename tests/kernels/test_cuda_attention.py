"""csrc/cuda/attention.cu, run on the CPU, against float64 within roundings that are counted."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatronish.kernels import attention as op
from megatronish.kernels.cuda import attention as cuda
from megatronish.kernels.dispatch import why_not
from megatronish.kernels.registry import choosing
from megatronish.kernels.table import KERNELS
from tests.kernels.cuda_on_cpu import ORDERS, as_cuda, counters, guarded, needs_compiler

pytestmark = needs_compiler

BOTH = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def draw(S: int, B: int, H: int, G: int, K: int, dtype: torch.dtype, *, size: float = 1.0) -> list[Tensor]:
    """query, key, value, dout."""
    generator = torch.Generator().manual_seed(S * 1000 + K)
    return [guarded((size * torch.randn(S, B, heads, K, generator=generator)).to(dtype)) for heads in (H, G, G, H)]


def run(query: Tensor, key: Tensor, value: Tensor, dout: Tensor, *, number: int = 0, scale: float | None = None) -> list[Tensor]:
    """out, lse, dquery, dkey, dvalue."""
    order, copies = ORDERS[number]
    with as_cuda(order=order, copies=copies):
        assert cuda.refuses(query, key, value) is None
        out, lse = cuda.forward(query, key, value, scale=scale)
        return [out, lse, *cuda.backward(dout, query, key, value, out, lse, scale=scale)]


def truth(query: Tensor, key: Tensor, value: Tensor, dout: Tensor, scale: float) -> tuple[list[Tensor], list[Tensor]]:
    """In float64, of the rounded inputs: what `run` gives, and how far from it each element may be.

    With u the unit roundoff of the dtype: a weight p is rounded on its way into P V and P^T dO, a score's gradient ds on its way
    into dS K and dS^T Q (u |p|, u |ds|); delta = dout . out takes the rounded output (u |dout| |out|), and p times that goes into
    ds; a result is rounded (u |result|). All else is in float32: 2^-18 of the largest term."""
    u = torch.finfo(query.dtype).eps / 2
    S, repeats = query.shape[0], query.shape[2] // key.shape[2]
    q, k, v, do = (x.double() for x in (query, key, value, dout))
    k, v = (x.repeat_interleave(repeats, 2) for x in (k, v))
    scores = torch.einsum("sbhk,tbhk->bhst", q, k) * scale
    scores = scores.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -math.inf)
    p, lse = scores.softmax(-1), scores.logsumexp(-1)

    def by_keys(weights: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("bhst,tbhk->sbhk", weights, x)

    def by_queries(weights: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("bhst,sbhk->tbhk", weights, x).unflatten(2, (-1, repeats)).sum(3)

    out = by_keys(p, v)
    ds = p * (torch.einsum("sbhk,tbhk->bhst", do, v) - (do * out).sum(-1).permute(1, 2, 0)[..., None])
    ds_error = u * ds.abs() + p * u * (do * out).abs().sum(-1).permute(1, 2, 0)[..., None]
    wants = [out, lse, scale * by_keys(ds, k), scale * by_queries(ds, q), by_queries(p, do)]
    errors = [
        u * by_keys(p, v.abs()),
        torch.zeros_like(lse),
        scale * by_keys(ds_error, k.abs()),
        scale * by_queries(ds_error, q.abs()),
        u * by_queries(p, do.abs()),
    ]
    for number, (want, error) in enumerate(zip(wants, errors, strict=True)):
        # A second rounding rounds what has the first one's error: 1.01.
        error += u * want.abs() * (number != 1) + 2**-18 * max(1.0, want.abs().max().item())
    return wants, [1.01 * error for error in errors]


def check(inputs: list[Tensor], *, number: int = 0, scale: float | None = None) -> None:
    results = run(*inputs, number=number, scale=scale)
    wants, bounds = truth(*inputs, 1 / math.sqrt(inputs[0].shape[-1]) if scale is None else scale)
    for name, got, want, bound in zip(("out", "lse", "dq", "dk", "dv"), results, wants, bounds, strict=True):
        excess = ((got.double() - want).abs() - bound).max().item()
        assert excess <= 0, f"{name}: {excess:.2e} above a bound of up to {bound.max():.2e}"


@BOTH
@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize(("S", "B", "H", "G"), [(1, 1, 2, 1), (63, 2, 2, 2), (129, 1, 4, 1), (200, 1, 2, 1)])
def test_equals_float64(S: int, B: int, H: int, G: int, K: int, dtype: torch.dtype) -> None:
    check(draw(S, B, H, G, K, dtype))


@settings(max_examples=5)
@given(
    S=st.integers(1, 200),
    B=st.integers(1, 2),
    G=st.integers(1, 2),
    repeats=st.integers(1, 3),
    K=st.sampled_from([64, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    number=st.integers(0, 2),
)
def test_equals_float64_at_any_shape(S: int, B: int, G: int, repeats: int, K: int, dtype: torch.dtype, number: int) -> None:
    check(draw(S, B, G * repeats, G, K, dtype), number=number)


@pytest.mark.parametrize(("K", "dtype"), [(64, torch.float16), (128, torch.bfloat16)])
def test_same_bits_whichever_threads_and_blocks_go_first(K: int, dtype: torch.dtype) -> None:
    inputs = draw(140, 1, 2, 1, K, dtype)
    first = run(*inputs)
    for number in range(len(ORDERS)):
        for got, want in zip(run(*inputs, number=number), first, strict=True):
            assert torch.equal(got.view(torch.int16), want.view(torch.int16))


def test_takes_heads_of_one_packed_tensor() -> None:
    # As a fused QKV projection leaves them: strides of S, B and heads that are not those of a tensor of its own.
    S, B, H, G, K = 70, 2, 4, 2, 64
    packed = guarded(torch.randn(S, B, H + 2 * G, K, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16))
    query, key, value = packed.split([H, G, G], 2)
    assert not query.is_contiguous() and not key.is_contiguous()
    check([query, key, value, torch.ones(B, S, H, K).to(torch.bfloat16).transpose(0, 1)])


@BOTH
def test_scores_of_thousands_and_a_given_scale(dtype: torch.dtype) -> None:
    # Weights of 0 and 1: a maximum that is not subtracted overflows.
    inputs = draw(100, 1, 1, 1, 64, dtype, size=8.0)
    assert (inputs[0][:, 0, 0].double() @ inputs[1][:, 0, 0].double().T).abs().max() > 2000
    check(inputs, scale=1.0)


def test_ldmatrix_meets_no_bank_twice() -> None:
    counters()
    run(*draw(130, 1, 1, 1, 128, torch.bfloat16))
    run(*draw(130, 1, 1, 1, 64, torch.bfloat16))
    counted = counters()
    assert counted["ldmatrix"] > 1000 and counted["conflicts"] == 0


def test_refuses_by_name() -> None:
    query, key, value, _ = draw(8, 1, 2, 1, 64, torch.bfloat16)
    with as_cuda():
        assert "torch.float32" in str(cuda.refuses(query.float(), key.float(), value.float()))
        assert "head size 32" in str(cuda.refuses(query[..., :32], key[..., :32], value[..., :32]))
        assert "8 queries with 7 keys" in str(cuda.refuses(query, key[:7], value[:7]))
        shifted = torch.empty(8 * 2 * 64 + 1, dtype=torch.bfloat16)[1:].view(8, 1, 2, 64)
        assert "16 bytes" in str(cuda.refuses(shifted, key, value))
        assert "16 bytes" in str(cuda.refuses(query.transpose(0, 3).contiguous().transpose(0, 3), key, value))


def test_refuses_what_takes_more_shared_memory_than_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    source = (Path(__file__).resolve().parents[2] / "csrc/cuda/attention.cu").read_text()
    kept, passing = map(int, re.findall(r"kKept = (\d+), kPassing = (\d+)", source)[0])
    formula = re.findall(r"kShared = (.*kKept.*);", source)[0]
    for K in cuda.HEAD_SIZES:
        assert cuda.shared_bytes(K) == eval(formula, {"kKept": kept, "kPassing": passing, "K": K})
    with as_cuda():
        given = {K: draw(8, 1, 1, 1, K, torch.bfloat16)[:3] for K in cuda.HEAD_SIZES}
        assert all(cuda.refuses(*x) is None for x in given.values())
        monkeypatch.setattr(cuda, "shared_memory_of", lambda x: 99 * 1024)  # compute capabilities 8.6, 8.9 and 12.0
        assert cuda.refuses(*given[64]) is None
        assert re.search("101376 bytes.*132096", str(cuda.refuses(*given[128])))


def test_agrees_with_the_op() -> None:
    inputs = draw(50, 2, 4, 2, 64, torch.bfloat16)
    out, lse = op.reference(*(x.double() for x in inputs[:3]))
    wants, _ = truth(*inputs, 1 / 8)
    torch.testing.assert_close(wants[0], out)
    torch.testing.assert_close(wants[1], lse)


def test_the_op_runs_them_where_the_config_says_so() -> None:
    *inputs, dout = draw(50, 2, 4, 2, 64, torch.bfloat16)
    with as_cuda(), choosing({"attention": "cuda"}):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = op.attention(*leaves)
        grads = torch.autograd.grad(out, leaves, dout)
    want = run(*inputs, dout)
    for got, key in zip((out, *grads), (0, 2, 3, 4), strict=True):
        assert torch.equal(got, want[key])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in ("attention", "rms_norm", "layer_norm") for dtype in (torch.bfloat16, torch.float16)],
)
def test_dispatch_admits_the_bodies_in_cuda(name: str, dtype: torch.dtype) -> None:
    with as_cuda():
        assert why_not(KERNELS[name], "cuda", dtype, "cpu") is None
