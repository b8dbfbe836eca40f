"""ZeRO 2: a rank holds of gradients no more than its slices and twice the largest group; sums, their order, and what is rounded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatronish.assemble import assemble, draw_weights, mesh_shape
from megatronish.comm.groups import single_process_group, world_group
from megatronish.comm.recording import Recorder
from megatronish.layout import ParamPlacement
from megatronish.optim.buckets import plan_buckets
from megatronish.optim.grad_buffer import GradBuffer, narrow_in_place
from megatronish.optim.sharded_grads import ShardedGradBuffer, make_grad_buffer
from megatronish.parallel.mesh import build_mesh
from tests.batches import LearnableBatches
from tests.parallel.parity import Case
from tests.ranks import ranks

METHODS = ("_allocate", "zero", "view", "contributed", "take_autograd_gradient", "finish")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all memory that is allocated while it is on, for as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageWeakRef(x.untyped_storage()) for x in tree_iter((args, kwargs or {})) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                reference = StorageWeakRef(x.untyped_storage())
                if reference not in given:
                    self.live[reference] = x.untyped_storage().nbytes()
        self.live = {reference: size for reference, size in self.live.items() if not reference.expired()}
        self.peak = max(self.peak, sum(self.live.values()))
        return out


@contextmanager
def counted_gradients() -> Iterator[LiveBytes]:
    """Counts what the gradient buffer allocates, communication inside included; what autograd computes is not its memory."""
    counter, depth = LiveBytes(), [0]

    def counting(method: Any) -> Any:
        @wraps(method)
        def call(*args: Any) -> Any:
            if depth[0]:
                return method(*args)
            depth[0] = 1
            try:
                with counter:
                    return method(*args)
            finally:
                depth[0] = 0

        return call

    with ExitStack() as stack:
        for name in METHODS:
            stack.enter_context(patch.object(ShardedGradBuffer, name, counting(getattr(ShardedGradBuffer, name))))
        yield counter


def measure(rank: int, case: Case, reduce_dtype: str | None) -> dict[str, int]:
    """Two steps on a real rank: the most bytes of gradients, those of all its buckets in full, and of the largest group."""
    config = case.config()
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"grad_reduce_dtype": reduce_dtype})})
    mesh = build_mesh(mesh_shape(config, case.world_size), rank, device=torch.device("cpu"))
    with counted_gradients() as counter:
        run = assemble(config, mesh, LearnableBatches(config, mesh.index("dp"), mesh.size("dp")))
        draw_weights(config, run.cut)
        run.optimizer.reset_master()
        for _ in run.trainer.fit(1, 2):
            pass
        run.optimizer.ensure_parameters()
    groups: dict[int, int] = {}
    for bucket in run.cut.buckets:
        groups[bucket.group] = groups.get(bucket.group, 0) + bucket.num_elements * 4
    grads = run.trainer.grads
    assert isinstance(grads, ShardedGradBuffer)
    assert grads.held_bytes() == sum(groups.values()) // case.dp
    assert grads.scratch_bytes() == 2 * max(groups.values())
    return {"peak": counter.peak, "total": sum(groups.values()), "largest": max(groups.values()), "groups": len(groups)}


CASES = [
    Case(dp=3),
    Case(dp=4, bucket_mib=1e-5),
    Case(dp=3, pp=2, num_microbatches=5),
    Case(dp=3, tp=2, sequence=True, recompute="full"),
    # Biases and two-sided norms: five kinds of buckets. The tied embedding gets a gradient first and last.
    Case(dp=4, architecture="gpt2", tie_embeddings=True),
    Case(dp=3, pp=2, architecture="gpt2", tie_embeddings=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("reduce_dtype", [None, "bfloat16"])
def test_gradients_take_their_share_and_two_groups(case: Case, reduce_dtype: str | None) -> None:
    case = Case(**{**vars(case), "zero_stage": 2, "dtype": "float32"})
    for seen in ranks(case.world_size).run(measure, case, reduce_dtype):
        assert seen["groups"] >= 3
        # A number a parameter for the report of what is not finite, and a sixteenth of a group while it is rounded in place.
        aside = 64 * 40 + (seen["largest"] // 16 if reduce_dtype else 0)
        assert seen["peak"] <= seen["total"] / case.dp + 2 * seen["largest"] + aside
        assert seen["peak"] > seen["total"] / case.dp + seen["largest"], "one group travels while the next is filled"


SHAPES = {"a": (40, 3), "b": (7,), "c": (50, 2), "d": (9,), "e": (60, 2), "f": (3,)}


def build(group: Any, *, tied: tuple[str, ...] = (), reduce_dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    table = {name: ParamPlacement(shape, torch.float32, None, (0,), 0, tied=name in tied) for name, shape in SHAPES.items()}
    at = {"tp_rank": 0, "tp_size": 1, "dp_size": group.size}
    buckets = plan_buckets(table, bucket_elements=100, close="together", **at)
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    groups = {"dp": group, "tp": single_process_group("tp")}
    numbers = {"dtype": torch.float32, "device": torch.device("cpu"), "reduce_dtype": reduce_dtype}
    return make_grad_buffer(buckets, parameters, groups=groups, zero_stage=2, **numbers), parameters


def gradient(name: str, seed: int) -> Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed * 100 + ord(name)))


def reduce_in_order(rank: int, orders: list[str], kind: dict[str, Any], recorder: Recorder | None = None) -> Any:
    """Each string is one microbatch: the parameters in the order in which its backward reaches them. (owned slices, calls)"""
    group = world_group(device_kind="cpu")
    grads, parameters = build(group, **kind)
    assert isinstance(grads, ShardedGradBuffer)
    grads.zero()
    for microbatch, order in enumerate(orders):
        if microbatch == len(orders) - 1:
            grads.begin_last_backward()
        for name in order:
            grads.view(parameters[name]).add_(gradient(name, 10 * microbatch + rank))
            grads.contributed(parameters[name])
            assert len(grads._filling) + len(grads._reducing) <= 2
    grads.finish()
    largest = dict(zip(grads.names, grads.local_max.tolist(), strict=True))
    return [grads.owned(i).clone() for i in range(len(grads.buckets))], largest, len(recorder.calls) if recorder else 0


def joined(results: list[Any], tied: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Whole gradients from the ranks' slices."""
    grads, _ = build(single_process_group("dp"), tied=tied)
    table = {name: ParamPlacement(shape, torch.float32, None, (0,), 0, tied=name in tied) for name, shape in SHAPES.items()}
    at = {"tp_rank": 0, "tp_size": 1, "dp_size": len(results)}
    whole = {}
    for index, bucket in enumerate(plan_buckets(table, bucket_elements=100, close="together", **at)):
        flat = torch.cat([owned[index] for owned, _, _ in results])
        whole |= {slot.name: flat[slot.start : slot.stop].view(SHAPES[slot.name]) for slot in bucket.slots}
    assert isinstance(grads, GradBuffer) and not isinstance(grads, ShardedGradBuffer), "one data rank needs no scratch"
    return whole


# In order; reversed, where the first group is complete last; mixed, where backward leaves two groups unfinished for a third.
ORDERS = {"in order": "fedcba", "reversed": "abcdef", "mixed": "facebd"}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("size", [2, 3])
def test_any_order_of_backward_gives_the_sum_over_ranks_and_microbatches(size: int, order: str) -> None:
    results = ranks(size).run(reduce_in_order, [order, order, order[::-1]], {})
    for name, got in joined(results).items():
        expected = sum(gradient(name, 10 * m + rank).double() for m in range(3) for rank in range(size))
        # Nine float32 numbers of size up to 4, added in another order.
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=3e-6)
    if order == ORDERS["in order"]:  # else two microbatches may meet in one scratch
        results = ranks(size).run(reduce_in_order, [order] * 3, {})
        for rank, (_, largest, _) in enumerate(results):
            for name, value in largest.items():
                assert value == max(gradient(name, 10 * m + rank).abs().max() for m in range(3))


def test_a_parameter_that_is_used_twice_is_reduced_at_each_use() -> None:
    # A tied embedding on a single stage: first the head's gradient, last the embedding's. Between them its scratch is free.
    results = ranks(2).run(reduce_in_order, ["afedcba"], {"tied": ("a",)})
    got = joined(results, tied=("a",))
    for name in SHAPES:
        times = 2 if name == "a" else 1
        torch.testing.assert_close(got[name], times * (gradient(name, 0) + gradient(name, 1)), rtol=0, atol=3e-6)


def test_a_parameter_without_a_gradient_counts_as_zero() -> None:
    results = ranks(2).run(reduce_in_order, ["fecba", "fecba"], {})
    got = joined(results)
    assert got["d"].eq(0).all()
    for owned, largest, _ in results:
        assert largest["d"] == 0 and not torch.cat(owned).isnan().any()


def test_groups_travel_once_a_microbatch() -> None:
    order = ORDERS["in order"]
    calls = [ranks(3).run(reduce_in_order, [order] * m, {}, recorded=True)[0][2] for m in (1, 2, 4)]
    assert calls[1] == 2 * calls[0] and calls[2] == 4 * calls[0]


@pytest.mark.parametrize("size", [2, 3])
def test_bfloat16_on_the_way_rounds_each_addend_and_each_partial_sum(size: int) -> None:
    orders = [ORDERS["in order"]] * 3
    results = ranks(size).run(reduce_in_order, orders, {"reduce_dtype": torch.bfloat16})
    exact = ranks(size).run(reduce_in_order, orders, {"reduce_dtype": torch.float32})
    plain = ranks(size).run(reduce_in_order, orders, {})
    unit = torch.finfo(torch.bfloat16).eps / 2
    for name, got in joined(results).items():
        addends = [[gradient(name, 10 * m + rank) for rank in range(size)] for m in range(3)]
        # A microbatch travels by itself: size addends are rounded, and size - 1 sums of them; what is added up is float32.
        room = sum((2 * size - 1) * sum(a.abs() for a in of_ranks) for of_ranks in addends) * unit
        error = (got - joined(exact)[name]).abs()
        assert (error <= room + 3e-6).all()
        assert error.max() > 1e-4, "nothing was rounded"
        assert torch.equal(joined(exact)[name], joined(plain)[name])


@pytest.mark.parametrize("length", [1, 15, 16, 17, 4096, 100_003])
def test_rounding_in_place_equals_rounding(length: int) -> None:
    for wide, narrow in ((torch.float32, torch.bfloat16), (torch.float64, torch.float32), (torch.float64, torch.bfloat16)):
        flat = torch.randn(length, generator=torch.Generator().manual_seed(1), dtype=wide)
        expected = flat.to(narrow)
        assert torch.equal(narrow_in_place(flat, narrow), expected)
