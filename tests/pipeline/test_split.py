"""Splitting layers over stages by cost."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish.errors import UserError
from megatronish.pipeline.split import split_layers


def all_splits(num_layers: int, num_stages: int) -> list[tuple[int, ...]]:
    return [
        tuple(stop - start for start, stop in zip((0, *cuts), (*cuts, num_layers), strict=True))
        for cuts in combinations(range(1, num_layers), num_stages - 1)
    ]


@settings(max_examples=300, deadline=None)
@given(
    num_stages=st.integers(1, 5),
    extra_layers=st.integers(0, 6),
    layer_cost=st.integers(1, 4),
    embedding_cost=st.integers(0, 12),
    head_cost=st.integers(0, 12),
)
def test_split_is_optimal_against_brute_force(
    num_stages: int, extra_layers: int, layer_cost: int, embedding_cost: int, head_cost: int
) -> None:
    """Least largest cost, then least second largest, ..., then fewest layers on the first and last stage."""
    num_layers = num_stages + extra_layers

    def rank(sizes: tuple[int, ...]) -> tuple[list[int], int]:
        costs = [layer_cost * size for size in sizes]
        costs[0] += embedding_cost
        costs[-1] += head_cost
        return sorted(costs, reverse=True), sizes[0] + sizes[-1]

    parts = split_layers(num_layers, num_stages, layer_cost=layer_cost, embedding_cost=embedding_cost, head_cost=head_cost)
    assert [layer for part in parts for layer in part] == list(range(num_layers))
    assert len(parts) == num_stages and all(parts)
    assert rank(tuple(map(len, parts))) == min(map(rank, all_splits(num_layers, num_stages)))


@pytest.mark.parametrize(("num_layers", "num_stages"), [(8, 2), (8, 4), (32, 8), (80, 16), (128, 64), (5, 1)])
def test_equal_layers_and_small_ends_give_equal_parts(num_layers: int, num_stages: int) -> None:
    parts = split_layers(num_layers, num_stages, layer_cost=1.0, embedding_cost=0.1, head_cost=0.9)
    assert {len(part) for part in parts} == {num_layers // num_stages}


def test_a_head_of_many_layers_takes_layers_from_the_last_stage() -> None:
    parts = split_layers(32, 4, layer_cost=1.0, embedding_cost=0.0, head_cost=4.0)
    assert [len(part) for part in parts] == [9, 9, 9, 5]


def test_extra_layers_go_to_later_middle_stages_that_hold_fewer_microbatches() -> None:
    parts = split_layers(14, 6, layer_cost=1.0, embedding_cost=0.0, head_cost=0.0)
    assert [len(part) for part in parts] == [2, 2, 2, 3, 3, 2]


def test_fewer_layers_than_stages_is_refused_with_both_numbers_and_the_key() -> None:
    with pytest.raises(UserError, match=r"model\.num_layers=3 .* parallel\.pipeline x parallel\.num_chunks=4"):
        split_layers(3, 4, layer_cost=1.0, embedding_cost=0.0, head_cost=0.0)
