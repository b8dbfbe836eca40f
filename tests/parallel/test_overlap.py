"""Cut linears communicate under their products: what a backward starts, it waits for after the work that does not need it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from megatronish.comm import Group, Pending
from megatronish.parallel import tensor
from megatronish.parallel.tensor import ColumnParallelLinear, RowParallelLinear, TensorParallel

S, B, IN, OUT = 4, 1, 6, 8


@dataclass
class Noted(Pending):
    """A communication whose wait is written down."""

    name: str = ""
    events: tuple[list[str], ...] = ()

    def wait(self) -> Tensor:
        self.events[0].append(f"wait {self.name}")
        return self.result


class NotingSink:
    """Writes down the products of weights and biases."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def linear(self, weight: nn.Parameter, dy: Tensor, x: Tensor) -> None:
        assert dy.shape[:-1] == x.shape[:-1], "of the whole sequence"
        self.events.append("weight product")

    def bias(self, bias: nn.Parameter, dy: Tensor) -> None:
        self.events.append("bias sum")

    def rows(self, weight: nn.Parameter, dy: Tensor, rows: Tensor) -> None:
        raise AssertionError


@pytest.fixture
def events() -> Iterator[list[str]]:
    """What communicates and multiplies, in order, as on the first of two tensor ranks."""
    noted: list[str] = []

    def start(name: str, result: Tensor) -> Pending:
        noted.append(f"start {name}")
        return Noted(result, name=name, events=(noted,))

    input_gradient = tensor.linear_input_gradient

    def noted_input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
        noted.append("input product")
        return input_gradient(dy, weight)

    with (
        patch.object(tensor, "start_all_gather", lambda x, group, what: start("gather", torch.cat((x, x)))),
        patch.object(tensor, "start_reduce_scatter", lambda x, group, what: start("sum", x[: S // 2])),
        patch.object(tensor, "start_all_reduce", lambda x, group, what: start("sum", x)),
        patch.object(tensor, "linear_input_gradient", noted_input_gradient),
    ):
        yield noted


def backward_events(
    cut: type[ColumnParallelLinear] | type[RowParallelLinear], events: list[str], *, sequence: bool, regather: bool = False
) -> list[str]:
    """Those of the backward of a linear with a bias."""
    tp = TensorParallel(Group("tp", (0, 1), 0), sequence_parallel=sequence, regather_input=regather, sink=NotingSink(events))
    module = cut(nn.Parameter(torch.randn(OUT, IN)), nn.Parameter(torch.randn(OUT)), tp)
    is_cut = sequence and cut is ColumnParallelLinear
    out = module(torch.randn(S // 2 if is_cut else S, B, IN, requires_grad=True))
    events.clear()
    out.sum().backward()
    return list(events)


@pytest.mark.parametrize("sequence", [False, True])
def test_the_input_gradient_is_summed_under_the_weight_product(sequence: bool, events: list[str]) -> None:
    order = ["input product", "start sum", "weight product", "bias sum", "wait sum"]
    assert backward_events(ColumnParallelLinear, events, sequence=sequence) == order


def test_a_column_linears_input_is_gathered_again_under_the_input_product(events: list[str]) -> None:
    order = ["start gather", "input product", "wait gather", "start sum", "weight product", "bias sum", "wait sum"]
    assert backward_events(ColumnParallelLinear, events, sequence=True, regather=True) == order


def test_a_row_linears_output_gradient_is_gathered_under_the_bias_sum(events: list[str]) -> None:
    order = ["start gather", "bias sum", "wait gather", "input product", "weight product"]
    assert backward_events(RowParallelLinear, events, sequence=True) == order
