"""Every row of KERNELS against its reference in float64: results, gradients, and what torch.library promises for its ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from megatronish.comm.random import normal_fill_
from megatronish.kernels import registry
from megatronish.kernels.adamw import AdamWNumbers, adamw_
from megatronish.kernels.cross_entropy import cross_entropy_backward, cross_entropy_parts
from megatronish.kernels.table import KERNELS, Kernel
from megatronish.layout import shard_range

# By op: how often a result, and a gradient, is rounded to the inputs' dtype on its way, and the longest sum inside for the sample
# inputs. In sums the error of `length` terms in another order grows as sqrt(length), in the accumulation dtype.
ROUNDINGS: dict[str, tuple[int, int, int]] = {
    # x / rms is rounded before the weight multiplies it. dx: once.
    "rms_norm": (2, 1, 96),
    # All in the accumulation dtype, rounded at the end; so are dx and the gradients of weight and bias.
    "layer_norm": (1, 1, 96),
    # The same of a sum that is rounded to the inputs' dtype. dx: from that sum, rounded, and the sum's gradient added.
    "add_rms_norm": (3, 3, 96),
    "add_layer_norm": (2, 3, 96),
    # Two products and a sum, all in the tables' dtype; rounded at the end.
    "split_rotary": (1, 1, 2),
    # silu, then the product. Backward: dy * up is rounded, then the derivative of silu (and dy * silu likewise).
    "swiglu": (2, 2, 1),
    # The same with GELU.
    "geglu": (2, 2, 1),
    # Inside in float32, rounded at the end.
    "gelu": (1, 1, 1),
    # The flash kernel rounds the probabilities before the product with the values, and its result. Backward: scores' gradients and
    # probabilities are rounded, summed, scaled and rounded, and start from an output that was rounded already.
    "attention": (2, 6, 64),
    # Weights and their gradients stay in the accumulation dtype; backward starts from an output that was rounded.
    "masked_attention": (1, 2, 64),
    # The kernel of CPUs rounds the probabilities before the product with the values, and its result.
    "cached_attention": (2, 0, 33),
    "dropout": (1, 1, 1),
    # x + bias, GELU, dropout, the sum. Backward: dropout, GELU's derivative, which starts from a sum that was rounded.
    "bias_gelu_dropout_add": (4, 3, 15),
    "linear": (1, 0, 33),
    "linear_input_gradient": (1, 0, 48),
    # The product is rounded once on CPU, then added to the bucket, which is smaller than it: hence two.
    "accumulate_weight_gradient": (2, 0, 10),
    "accumulate_bias_gradient": (0, 0, 12),
    "accumulate_row_gradient": (0, 0, 12),
    "cross_entropy": (1, 0, 40),
    "cross_entropy_parts": (0, 0, 40),
    "cross_entropy_backward": (1, 0, 1),
    "cross_entropy_backward_": (1, 0, 1),
    # `low` is the new master weights rounded once; the others stay in float32, or are rounded once: by chance, to either neighbour,
    # which is two roundings. Some twenty operations an element.
    "adamw": (2, 0, 20),
    # Squares are exact in float64, where all is summed: of float32, too.
    "square_sum": (0, 0, 60_000),
}
# Results are compared by their largest element, from which terms in a sum can be some times larger (they cancel).
CANCELLATION = 8
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
rows = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def tolerance(dtype: torch.dtype, roundings: int, length: int) -> float:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return roundings * unit_roundoff(dtype) + CANCELLATION * math.sqrt(length) * unit_roundoff(wide)


def on_tensors(function: Callable[[Tensor], Any], arguments: Sequence[Any]) -> list[Any]:
    """The arguments, with `function` of every tensor; in a list of tensors, too."""
    return [function(a) if isinstance(a, Tensor) else on_tensors(function, a) if isinstance(a, list) else a for a in arguments]


def copies(arguments: Sequence[Any]) -> list[Any]:
    return on_tensors(lambda a: a.clone(), arguments)


def widened(arguments: tuple[Any, ...]) -> list[Any]:
    """The same values in float64."""
    return on_tensors(lambda a: a.double() if a.is_floating_point() else a, copies(arguments))


def results(kernel: Kernel, returned: Any, arguments: list[Any]) -> list[Tensor]:
    given = [] if returned is None else [returned] if isinstance(returned, Tensor) else list(returned)
    return given + [arguments[i] for i in kernel.mutated if arguments[i] is not None]


def leaves(kernel: Kernel, arguments: list[Any]) -> list[Tensor]:
    """Those of the arguments that get a gradient."""
    return [arguments[i].requires_grad_() for i in kernel.differentiable if arguments[i] is not None]


def assert_close(got: Tensor, expected: Tensor, limit: float, what: str, *, floor: float = 0.0) -> None:
    """Relative to the largest element, or to `floor` where that is larger."""
    assert got.shape == expected.shape and not got.isnan().any(), what
    finite = expected.isfinite()
    assert torch.equal(got.double()[~finite], expected[~finite]), what
    if finite.any():
        error = (got.double() - expected)[finite].abs().max() / expected[finite].abs().max().clamp_min(floor)
        assert torch.equal(got.double(), expected) or error <= limit, f"{what} is off by {error:.1e}, allowed {limit:.1e}"


@rows
@dtypes
def test_results_equal_the_reference_in_float64(kernel: Kernel, dtype: torch.dtype) -> None:
    roundings, _, length = ROUNDINGS[kernel.name]
    for case, arguments in enumerate(kernel.sample_inputs(dtype, "cpu")):
        ours, exact = copies(arguments), widened(arguments)
        got = results(kernel, kernel.function(*ours), ours)
        expected = results(kernel, kernel.reference(*exact), exact)
        for index, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert_close(a, b, tolerance(dtype, roundings, length), f"{kernel.name}, case {case}, result {index}")


@pytest.mark.parametrize("kernel", [k for k in KERNELS.values() if k.differentiable], ids=lambda kernel: kernel.name)
@dtypes
def test_gradients_equal_those_of_the_reference_in_float64(kernel: Kernel, dtype: torch.dtype) -> None:
    _, roundings, length = ROUNDINGS[kernel.name]
    generator = torch.Generator().manual_seed(9)
    for case, arguments in enumerate(kernel.sample_inputs(dtype, "cpu")):
        gradients = []
        upstream: list[Tensor] = []
        for function, given in ((kernel.function, copies(arguments)), (kernel.reference, widened(arguments))):
            inputs = leaves(kernel, given)
            outputs = results(kernel, function(*given), given)
            upstream = upstream or [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype) for o in outputs]
            gradients.append(torch.autograd.grad(outputs, inputs, [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]))
        for position, got, expected in zip((i for i in kernel.differentiable if arguments[i] is not None), *gradients, strict=True):
            what = f"{kernel.name}, case {case}, gradient of argument {position}"
            # A sum over tokens in the inputs' dtype, where a gradient is one (weights, shared keys), is at most this much longer.
            # Inputs are of size 1: where all cancels (a token that attends to itself alone), what is left is rounding of those.
            assert_close(got, expected, tolerance(dtype, roundings, 2 * length), what, floor=1.0)


@rows
@dtypes
def test_the_function_is_deterministic_and_writes_only_what_it_says(kernel: Kernel, dtype: torch.dtype) -> None:
    for arguments in kernel.sample_inputs(dtype, "cpu"):
        first, second = copies(arguments), copies(arguments)
        for a, b in zip(
            results(kernel, kernel.function(*first), first), results(kernel, kernel.function(*second), second), strict=True
        ):
            assert torch.equal(a, b)
        for index, (before, after) in enumerate(zip(arguments, first, strict=True)):
            if isinstance(before, Tensor) and index not in kernel.mutated:
                assert torch.equal(before, after), f"{kernel.name} wrote to argument {index}"


def meaningful_strides(x: Tensor) -> list[int]:
    """A dimension of size 1 may have any stride."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


class Recorder(TorchDispatchMode):
    """Keeps copies of the arguments of every op of ours that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "megatronish":
            assert not kwargs
            self.calls.append((func, on_tensors(lambda a: a.detach().clone(), args)))
        return func(*args, **(kwargs or {}))


@contextmanager
def recording() -> Iterator[list[tuple[Any, list[Any]]]]:
    with Recorder() as recorder:
        yield recorder.calls


def all_calls() -> list[tuple[Any, list[Any]]]:
    """Every op of ours, forward and backward, with the arguments that the rows' sample inputs lead to."""
    with recording() as calls:
        for kernel in KERNELS.values():
            for dtype in DTYPES:
                for arguments in kernel.sample_inputs(dtype, "cpu"):
                    given = copies(arguments)
                    inputs = leaves(kernel, given)
                    outputs = results(kernel, kernel.function(*given), given)
                    if kernel.differentiable:
                        torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])
        normal_fill_(torch.empty(3, 4), offsets=(1, 2), global_shape=(8, 9), key=5, std=0.1)
    return calls


CALLS = all_calls()


def test_every_registered_op_is_reached_from_the_table() -> None:
    registered = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("megatronish::")}
    registered = {name for name in registered if not name.endswith("_for_tests")}
    assert {op.name().split(".")[0] for op, _ in CALLS} == registered


@pytest.mark.parametrize("name", sorted({op.name() for op, _ in CALLS}))
def test_an_op_keeps_the_promises_of_its_schema_and_its_fake(name: str) -> None:
    for op, arguments in CALLS:
        if op.name() == name:
            opcheck(op, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", sorted({op.name() for op, _ in CALLS}))
def test_fake_results_have_the_shape_dtype_and_strides_of_real_ones_of_every_body(name: str) -> None:
    done: list[registry.Implementation] = []
    registered = registry._ops.get(name.split("::")[1].split(".")[0])  # not there: the one op of comm/
    for op, arguments in CALLS:
        if op.name() != name:
            continue
        with FakeTensorMode() as mode:
            fake = op(*on_tensors(mode.from_tensor, arguments))
        for body in registered.bodies.values() if registered else [registry.Implementation(op)]:
            # An interpreter is slow: one call is enough for a body that is not the first.
            if body.refuses(*arguments) is not None or body in done:
                continue
            if registered and body is not next(iter(registered.bodies.values())):
                done.append(body)
            real = body.run(*copies(tuple(arguments)))
            if real is None:
                assert fake is None
                continue
            pairs = [(real, fake)] if isinstance(real, Tensor) else list(zip(real, fake, strict=True))
            for r, f in pairs:
                assert (r.shape, r.dtype, meaningful_strides(r)) == (f.shape, f.dtype, meaningful_strides(f))


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5])
@pytest.mark.parametrize("vocab_size", [37, 40])
def test_cross_entropy_joined_from_any_cut_of_the_columns_equals_torch(num_parts: int, vocab_size: int) -> None:
    # 40 rows, some of them padding; with five parts and 30 tokens the last part would hold padding alone.
    generator = torch.Generator().manual_seed(0)
    logits_TV = (torch.randn(11, 40, generator=generator, dtype=torch.float64) * 5).requires_grad_()
    labels_T = torch.randint(vocab_size, (11,), generator=generator)
    dloss_T = torch.rand(11, generator=generator, dtype=torch.float64)
    expected_T = torch.nn.functional.cross_entropy(logits_TV[:, :vocab_size], labels_T, reduction="none")
    (expected_TV,) = torch.autograd.grad(expected_T, logits_TV, dloss_T)

    cuts = [shard_range(40, part, num_parts) for part in range(num_parts)]
    shards = [(logits_TV.detach()[:, a:b].contiguous(), labels_T, a, max(0, min(b, vocab_size) - a)) for a, b in cuts]
    max_PT, sum_PT, target_PT = torch.stack([cross_entropy_parts(*shard) for shard in shards], 1)
    max_T = max_PT.amax(0)
    log_sum_exp_T = (sum_PT * (max_PT - max_T).exp()).sum(0).log() + max_T
    torch.testing.assert_close(log_sum_exp_T - target_PT.sum(0), expected_T.detach(), rtol=1e-13, atol=1e-13)
    grads = [cross_entropy_backward(dloss_T, logits, labels, log_sum_exp_T, a, n) for logits, labels, a, n in shards]
    torch.testing.assert_close(torch.cat(grads, 1), expected_TV, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("num_steps", [1, 20])
def test_adamw_equals_torch_optim_adamw(num_steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    expected = torch.nn.Parameter(torch.randn(103, generator=generator, dtype=torch.float64))
    optimizer = torch.optim.AdamW([expected], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    master = expected.detach().clone()
    exp_avg, exp_avg_sq = torch.zeros_like(master), torch.zeros_like(master)
    numbers = AdamWNumbers(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    for step in range(1, num_steps + 1):
        refused = torch.tensor([float("nan"), step], dtype=torch.float64)
        adamw_(master, master, exp_avg, exp_avg_sq, scalars=refused, low=None, numbers=numbers)
        grad = torch.randn(103, generator=generator, dtype=torch.float64)
        expected.grad = 0.5 * grad
        optimizer.step()
        scalars = torch.tensor([0.5, step], dtype=torch.float64)
        adamw_(master, grad, exp_avg, exp_avg_sq, scalars=scalars, low=None, numbers=numbers)
    # float64, an operation's rounding each: the same formula.
    torch.testing.assert_close(master, expected.detach(), rtol=1e-13, atol=1e-14)
