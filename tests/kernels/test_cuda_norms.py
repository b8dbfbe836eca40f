"""csrc/cuda/norms.cu, run on the CPU, against float64 within roundings that are counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatronish.errors import UserError
from megatronish.kernels.cuda import norms
from megatronish.kernels.registry import choosing
from megatronish.kernels.table import KERNELS
from tests.kernels.cuda_on_cpu import ORDERS, as_cuda, guarded, needs_compiler

pytestmark = needs_compiler

Results = dict[str, Tensor]


def draw(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int = 0, offset: float = 0.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed + shape[-1])
    names = {"x": shape, "residual": shape, "dy": shape, "dsum": shape, "weight": shape[-1:], "bias": shape[-1:]}
    return {n: guarded((torch.randn(*s, generator=generator) + offset * (n == "x")).to(dtype)) for n, s in names.items()}


def run(given_: dict[str, Tensor], *, center: bool, residual: bool, number: int = 0, eps: float = 1e-5) -> Results:
    x, weight, bias = given_["x"], given_["weight"], given_["bias"] if center else None
    added, dsum = (given_["residual"], given_["dsum"]) if residual else (None, None)
    order, copies = ORDERS[number]
    with as_cuda(order=order, copies=copies):
        assert norms.refuses(x, weight) is None
        y, summed, rstd, mean = norms.forward(x, weight, bias, eps, added)
        dx, dweight, dbias = norms.backward(given_["dy"], summed, weight, rstd, mean, dsum)
    results = {"y": y, "sum": summed, "rstd": rstd, "mean": mean, "dx": dx, "dweight": dweight, "dbias": dbias}
    return {name: value for name, value in results.items() if value is not None}


def check(given_: dict[str, Tensor], *, center: bool, residual: bool, number: int = 0, eps: float = 1e-5) -> None:
    """With u the unit roundoff of the dtype: results are rounded once, RMSNorm's y twice (u |y| each). Sums over n elements in
    float32 are off by sqrt(n) roundings, and 8 for what is done with one element, each relative to the terms, not to their sum."""
    results = run(given_, center=center, residual=residual, number=number, eps=eps)
    u, D = torch.finfo(given_["x"].dtype).eps / 2, given_["x"].shape[-1]
    x = given_["x"]
    if residual:
        x = (x.float() + given_["residual"].float()).to(x.dtype)
    assert torch.equal(results["sum"], x)
    x, dy, weight = (t.double() for t in (x, given_["dy"], given_["weight"]))
    mean = x.mean(-1, keepdim=True) if center else torch.zeros(1, dtype=torch.float64)
    rstd = torch.rsqrt((x - mean).square().mean(-1, keepdim=True) + eps)
    normed, dnormed = (x - mean) * rstd, dy * weight
    bias = given_["bias"].double() if center else torch.zeros(1, dtype=torch.float64)
    product, total = (dnormed * normed).mean(-1, keepdim=True), dnormed.mean(-1, keepdim=True) * center
    added = given_["dsum"].double() if residual else torch.zeros(1, dtype=torch.float64)
    rows = tuple(range(x.dim() - 1))
    # |normed| with the mean's own error in it: that is relative to |x|.
    size = x.abs() * rstd + normed.abs()
    dsize = dnormed.abs() + size * (dnormed * size).abs().mean(-1, keepdim=True) + dnormed.abs().mean(-1, keepdim=True)
    wants = {
        "y": (normed * weight + bias, size * weight.abs() + bias.abs(), D),
        "rstd": (rstd, rstd * (1 + (x.abs().mean(-1, keepdim=True) * rstd).square() * center), D),
        "dx": ((dnormed - normed * product - total) * rstd + added, dsize * rstd + added.abs(), D),
        "dweight": ((dy * normed).sum(rows), (dy * size).abs().sum(rows), D + dy.numel() // D),
    }
    if center:
        wants["mean"] = (mean, x.abs().mean(-1, keepdim=True), D)
        wants["dbias"] = (dy.sum(rows), dy.abs().sum(rows), dy.numel() // D)
    for name, (want, terms, count) in wants.items():
        is_statistic = name in ("rstd", "mean")
        roundings = 0 if is_statistic else 2.02 if name == "y" and not center else 1.01
        bound = roundings * u * want.abs() + (8 + count**0.5) * 2**-24 * terms + torch.finfo(x.dtype).tiny
        if results[name].dtype == torch.float16:
            bound += 2**-25  # of subnormal numbers
        excess = ((results[name].double() - want).abs() - bound).max().item()
        assert excess <= 0, f"{name}: {excess:.2e} above a bound of up to {bound.max():.2e}"


@pytest.mark.parametrize("center", [False, True], ids=["rms_norm", "layer_norm"])
@pytest.mark.parametrize(
    ("dtype", "D"),
    [
        *((torch.bfloat16, D) for D in (64, 1024, 4104, 9000, 16384, 65536)),
        *((torch.float16, D) for D in (72, 768, 20000)),
        *((torch.float32, D) for D in (100, 512, 516, 5000, 65536)),
    ],
    ids=str,
)
def test_equals_float64(dtype: torch.dtype, D: int, center: bool) -> None:
    # Rows of a warp, of a block, longer than the registers; more rows than blocks where they are short.
    rows = 70 if D <= 1024 else 3
    check(draw((rows, D), dtype), center=center, residual=D % 16 == 8 or D > 16384)


@settings(max_examples=10)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(8, 700).map(lambda n: 8 * n)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    center=st.booleans(),
    residual=st.booleans(),
    number=st.integers(0, 2),
)
def test_equals_float64_at_any_shape(
    shape: tuple[int, int, int], dtype: torch.dtype, center: bool, residual: bool, number: int
) -> None:
    check(draw(shape, dtype), center=center, residual=residual, number=number)


@pytest.mark.parametrize("center", [False, True], ids=["rms_norm", "layer_norm"])
@pytest.mark.parametrize("D", [256, 2048, 24000])
def test_same_bits_whichever_threads_and_blocks_go_first(D: int, center: bool) -> None:
    given_ = draw((37 if D < 4096 else 3, D), torch.bfloat16)
    first = run(given_, center=center, residual=True)
    for number in range(len(ORDERS)):
        for name, got in run(given_, center=center, residual=True, number=number).items():
            assert torch.equal(got, first[name]), name


def test_a_mean_far_from_zero_does_not_cancel() -> None:
    # The variance as a difference of two sums would have no digit left: 10,000^2 against 1 in float32.
    given_ = draw((4, 512), torch.float32, offset=1e4)
    got = run(given_, center=True, residual=False)
    want = torch.nn.functional.layer_norm(given_["x"].double(), (512,), given_["weight"].double(), given_["bias"].double(), 1e-5)
    # The mean is off by at most sqrt(512) roundings of 10,000 in float32, one part in 74 of a deviation of 1.
    assert (got["y"].double() - want).abs().max() < 1e4 * 512**0.5 * 2**-24 * given_["weight"].abs().max()


@pytest.mark.parametrize("center", [False, True], ids=["rms_norm", "layer_norm"])
def test_rows_of_zeros_and_of_the_largest_numbers(center: bool) -> None:
    given_ = draw((3, 128), torch.float32)
    given_["x"][0] = 0.0
    given_["x"][1] *= 1e15  # squares of 1e30 and a sum of 1e32 still fit
    check(given_, center=center, residual=False)


def test_no_rows_at_all() -> None:
    given_ = draw((0, 64), torch.bfloat16)
    with as_cuda():
        y, _, rstd, mean = norms.forward(given_["x"], given_["weight"], None, 1e-5)
        dx, dweight, _ = norms.backward(given_["dy"], given_["x"], given_["weight"], rstd, mean)
    assert y.shape == dx.shape == (0, 64) and dweight.eq(0).all()


def test_refuses_by_name() -> None:
    given_ = draw((4, 64), torch.bfloat16)
    x, weight = given_["x"], given_["weight"]
    with as_cuda():
        assert "torch.float64" in str(norms.refuses(x.double(), weight.double()))
        assert "a weight of torch.float32" in str(norms.refuses(x, weight.float()))
        assert "rows of 60 elements" in str(norms.refuses(x[:, :60], weight[:60]))
        assert "65544" in str(norms.refuses(torch.zeros(1, 65544, dtype=torch.bfloat16), torch.zeros(65544, dtype=torch.bfloat16)))


def test_inputs_that_are_not_dense_or_not_aligned() -> None:
    given_ = draw((6, 64), torch.bfloat16)
    want = run(given_, center=True, residual=True)
    odd = {name: torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t) for name, t in given_.items()}
    columns = {name: t.T.contiguous().T if t.dim() == 2 else t for name, t in given_.items()}
    for other in (odd, columns):
        for name, got in run(other, center=True, residual=True).items():
            assert torch.equal(got, want[name]), name


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"])
def test_the_op_runs_them_where_the_config_says_so(name: str) -> None:
    given_ = draw((5, 3, 96), torch.bfloat16)
    function, adds, center = KERNELS[name].function, name.startswith("add"), name.endswith("layer_norm")
    inputs = [given_["x"], *([given_["residual"]] if adds else []), given_["weight"], *([given_["bias"]] if center else [])]
    with as_cuda(), choosing({name: "cuda"}):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves, 1e-5)
        grads = torch.autograd.grad(out, leaves, (given_["dy"], given_["dsum"]) if adds else given_["dy"])
    want = run(given_, center=center, residual=adds)
    if adds:
        assert torch.equal(out[1], given_["x"] + given_["residual"]) and torch.equal(grads[0], grads[1])
    for got, key in zip((out[0] if adds else out, *grads[adds:]), ("y", "dx", "dweight", "dbias"), strict=False):
        assert torch.equal(got, want[key]), key


def test_the_op_says_why_not_on_cpu() -> None:
    given_ = draw((2, 64), torch.bfloat16)
    with choosing({"rms_norm": "cuda"}), pytest.raises(UserError, match=r"kernels\.rms_norm=cuda.*tensors on CPU"):
        KERNELS["rms_norm"].function(given_["x"], given_["weight"], 1e-5)
