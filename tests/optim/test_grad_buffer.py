"""Gradient buckets: accumulation, which reductions run and in which order, and the norm of what they hold."""

from __future__ import annotations

import random
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from megatronish.comm import Pending
from megatronish.comm.groups import single_process_group, world_group
from megatronish.kernels.square_sum import square_sum
from megatronish.layout import ParamPlacement
from megatronish.optim.buckets import plan_buckets
from megatronish.optim.grad_buffer import GradBuffer
from megatronish.optim.grad_norm import clip_factor, owned_square_sum
from megatronish.optim.sharded_grads import make_grad_buffer
from tests.ranks import ranks

SHAPES = {"a": (5, 7), "b": (33,), "c": (4, 3, 2), "d": (64,), "e": (2, 9)}


def build(dp: Any = None, *, zero_stage: Any = 1, bucket_elements: int = 40) -> tuple[GradBuffer, dict[str, nn.Parameter]]:
    dp = dp or single_process_group("dp")
    table = {name: ParamPlacement(shape, torch.float64, None, (0,), 0) for name, shape in SHAPES.items()}
    buckets = plan_buckets(table, tp_rank=0, tp_size=1, dp_size=dp.size, bucket_elements=bucket_elements)
    parameters = {name: nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for name, shape in SHAPES.items()}
    groups = {"dp": dp, "tp": single_process_group("tp")}
    kind = {"dtype": torch.float64, "device": torch.device("cpu")}
    return make_grad_buffer(buckets, parameters, groups=groups, zero_stage=zero_stage, **kind), parameters


def gradient(name: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 100 + ord(name))
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(8))
def test_buckets_are_reduced_in_one_order_whatever_order_they_complete_in(seed: int) -> None:
    grads, parameters = build()
    assert len(grads.buckets) >= 3
    started: list[int] = []
    complete_at_start: list[bool] = []
    done: set[str] = set()

    def record(index: int) -> Pending:
        started.append(index)
        complete_at_start.append(all(slot.name in done for slot in grads.buckets[index].slots))
        return Pending(grads.flat[index])

    order = list(SHAPES)
    random.Random(seed).shuffle(order)
    with patch.object(grads, "_start_reduction", record):
        for name in order:  # not yet the last backward
            grads.contributed(parameters[name])
        assert not started
        grads.begin_last_backward()
        for name in order:
            done.add(name)
            grads.contributed(parameters[name])
        assert started == list(range(len(grads.buckets))), "each as soon as it and all before it are complete"
        grads.finish()
    assert started == list(range(len(grads.buckets))) and all(complete_at_start)


def test_a_bucket_starts_as_soon_as_it_and_those_before_it_are_complete() -> None:
    grads, parameters = build()
    started: list[int] = []
    with patch.object(grads, "_start_reduction", lambda index: started.append(index) or Pending(grads.flat[index])):
        grads.begin_last_backward()
        names = [[slot.name for slot in bucket.slots] for bucket in grads.buckets]
        for name in names[1]:
            grads.contributed(parameters[name])
        assert started == []
        for name in names[0]:
            grads.contributed(parameters[name])
        assert started == [0, 1]
        grads.finish()  # parameters without a gradient do not hold up the others
        assert started == list(range(len(grads.buckets)))


def test_a_bucket_waits_for_the_last_backward_of_all_its_parameters() -> None:
    """With chunks, some parameters have had their last contribution when others get one that is not."""
    grads, parameters = build()
    started: list[int] = []
    with patch.object(grads, "_start_reduction", lambda index: started.append(index) or Pending(grads.flat[index])):
        first, *others = [[parameters[slot.name] for slot in bucket.slots] for bucket in grads.buckets]
        for _ in range(2):  # two steps: the second starts afresh
            rest = [parameter for bucket in others for parameter in bucket]
            grads.begin_last_backward(rest)
            for parameter in (*rest, *first):  # that of `first` is not its last
                grads.contributed(parameter)
            assert started == []
            grads.begin_last_backward(first)
            assert started == []
            for parameter in first:
                grads.contributed(parameter)
            assert started == list(range(len(grads.buckets)))
            grads.finish()
            started.clear()


def test_gradients_of_autograd_and_of_modules_add_up_over_microbatches() -> None:
    grads, parameters = build()
    expected = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    grads.zero()
    for microbatch in range(3):
        if microbatch == 2:
            grads.begin_last_backward()
        for name, parameter in parameters.items():
            g = gradient(name, microbatch)
            if name == "a":  # as a linear does
                grads.view(parameter).add_(g)
                grads.contributed(parameter)
            else:
                (parameter * g).sum().backward()
            expected[name] += g
    grads.finish()
    for name, parameter in parameters.items():
        torch.testing.assert_close(grads.view(parameter), expected[name], rtol=1e-15, atol=1e-15)
        assert parameter.grad is None, "held twice"


def test_the_norm_counts_each_element_once_and_padding_not() -> None:
    grads, parameters = build()
    for name, parameter in parameters.items():
        grads.view(parameter).copy_(gradient(name, 0))
    expected = torch.cat([gradient(name, 0).flatten() for name in SHAPES]).square().sum()
    torch.testing.assert_close(owned_square_sum(grads), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("length", [16, 1024, 1040, 12_600_000])
def test_a_float32_square_sum_is_as_good_as_float32_at_any_length(length: int) -> None:
    x = torch.randn(length, generator=torch.Generator().manual_seed(0)) * 1e-3
    # Plain vector_norm on CPU is off by 1e-3 of the square at the last length: each layout would clip by another factor.
    assert float(square_sum([x])) == pytest.approx(float(x.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize(("norm", "limit", "factor"), [(2.0, 1.0, 0.5), (0.5, 1.0, 1.0), (7.0, 0.0, 1.0), (0.0, 1.0, 1.0)])
def test_the_clip_factor(norm: float, limit: float, factor: float) -> None:
    # As torch.nn.utils.clip_grad_norm_, which adds 1e-6 to the norm.
    assert float(clip_factor(torch.tensor(norm, dtype=torch.float64), limit)) == pytest.approx(factor, rel=1e-6)


def reduce_on_rank(rank: int, zero_stage: int, order_seed: int) -> tuple[list[Tensor], list[Tensor], float]:
    """Each rank's backward completes in its own order. Returns (buckets, owned slices, share of the squared norm)."""
    group = world_group(device_kind="cpu")
    grads, parameters = build(group, zero_stage=zero_stage)
    grads.begin_last_backward()
    order = list(SHAPES)
    random.Random(order_seed + rank).shuffle(order)
    for name in order:
        grads.view(parameters[name]).add_(gradient(name, rank))
        grads.contributed(parameters[name])
    grads.finish()
    return grads.flat, [grads.owned(i).clone() for i in range(len(grads.buckets))], float(owned_square_sum(grads))


@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_finish_in_other_orders_get_the_sum(size: int, zero_stage: int) -> None:
    results = ranks(size).run(reduce_on_rank, zero_stage, 5)
    table = {name: ParamPlacement(shape, torch.float64, None, (0,), 0) for name, shape in SHAPES.items()}
    buckets = plan_buckets(table, tp_rank=0, tp_size=1, dp_size=size, bucket_elements=40)
    total = 0.0
    for index, bucket in enumerate(buckets):
        expected = torch.zeros(bucket.num_elements, dtype=torch.float64)
        for slot in bucket.slots:
            expected[slot.start : slot.stop] = sum(gradient(slot.name, rank) for rank in range(size)).flatten()
        total += float(expected.square().sum())
        joined = torch.cat([owned[index] for _, owned, _ in results])
        torch.testing.assert_close(joined, expected, rtol=1e-14, atol=1e-14)
        if zero_stage == 0:
            for flat, _, _ in results:
                torch.testing.assert_close(flat[index], expected, rtol=1e-14, atol=1e-14)
    assert sum(share for _, _, share in results) == pytest.approx(total, rel=1e-13)
