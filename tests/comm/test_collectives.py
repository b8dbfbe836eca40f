"""Collectives on real gloo ranks: what every rank gets, in place and into parts of a buffer, on both paths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatronish.comm import Group, all_gather, all_reduce, reduce_scatter
from megatronish.comm.collectives import start_all_gather_into, start_all_reduce, start_reduce_scatter_into
from megatronish.comm.groups import new_group, single_process_group, world_group
from tests.ranks import ranks

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
sizes = pytest.mark.parametrize("size", [1, 2, 3, 4])
Result = dict[str, Tensor]


def own(rank: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """What a rank brings: small integers, exact in every dtype in any order of sums."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def everything(rank: int, size: int, dtype: torch.dtype, generic: bool) -> Result:
    """Every collective on this rank's numbers."""
    group = world_group(device_kind="cpu")
    assert group.size == size and group.index == rank and group.pairwise == (size == 2)
    if generic:
        group = replace(group, pairwise=False)
    result: Result = {}
    for op in ("sum", "max", "min"):
        x = own(rank, dtype, (3, 4))
        returned = all_reduce(x, group, op)  # type: ignore[arg-type]
        assert returned is x, "in place"
        result[op] = x
    whole = torch.zeros(6, 4, dtype=dtype)
    strided = whole[::2]
    strided.copy_(own(rank, dtype, (3, 4)))
    all_reduce(strided, group)
    assert not whole[1::2].any(), "wrote between the elements of a strided tensor"
    result["strided sum"] = strided.clone()
    result["scalar"] = all_reduce(own(rank, dtype, ()), group)
    result["gather"] = all_gather(own(rank, dtype, (2, 3)), group)
    result["gather of a transposed"] = all_gather(own(rank, dtype, (2, 3)).t(), group)
    result["scatter"] = reduce_scatter(own(rank, dtype, (2 * size, 3)), group)

    # Into and out of this rank's own part of a flat buffer, as buckets do.
    flat = torch.full((5 * size,), 99, dtype=dtype)
    mine = flat[5 * rank : 5 * rank + 5]
    mine.copy_(own(rank, dtype, (5,)))
    pending = start_all_gather_into(flat, mine, group)
    result["gather in place"] = pending.wait()
    assert pending.result.data_ptr() == flat.data_ptr() and pending.wait() is pending.result
    flat = own(rank, dtype, (5 * size,))
    mine = flat[5 * rank : 5 * rank + 5]
    assert start_reduce_scatter_into(mine, flat, group).wait().data_ptr() == mine.data_ptr()
    result["scatter in place"] = mine.clone()

    # Several under way, waited for in another order.
    xs = [own(rank + 10 * i, dtype, (7,)) for i in range(3)]
    pendings = [start_all_reduce(x, group) for x in xs]
    for pending in reversed(pendings):
        pending.wait()
    result["under way"] = torch.cat(xs)
    return result


def expected(rank: int, size: int, dtype: torch.dtype) -> Result:
    """The same from all ranks' numbers in one place."""
    every: Callable[..., Tensor] = lambda shape: torch.stack([own(r, dtype, shape) for r in range(size)])  # noqa: E731
    part = slice(5 * rank, 5 * rank + 5)
    return {
        "sum": every((3, 4)).sum(0),
        "max": every((3, 4)).amax(0),
        "min": every((3, 4)).amin(0),
        "strided sum": every((3, 4)).sum(0),
        "scalar": every(()).sum(0),
        "gather": every((2, 3)).flatten(0, 1),
        "gather of a transposed": every((2, 3)).transpose(1, 2).flatten(0, 1),
        "scatter": every((2 * size, 3)).sum(0)[2 * rank : 2 * rank + 2],
        "gather in place": every((5,)).flatten(),
        "scatter in place": every((5 * size,)).sum(0)[part],
        "under way": torch.cat([torch.stack([own(r + 10 * i, dtype, (7,)) for r in range(size)]).sum(0) for i in range(3)]),
    }


@sizes
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("generic", [False, True], ids=["pairwise where two", "generic"])
def test_every_rank_gets_what_all_ranks_bring(size: int, dtype: torch.dtype, generic: bool) -> None:
    for rank, got in enumerate(ranks(size).run(everything, size, dtype, generic)):
        truth = expected(rank, size, dtype)
        assert got.keys() == truth.keys()
        for name, value in truth.items():
            assert got[name].dtype == dtype and torch.equal(got[name], value), f"{name} on rank {rank}"


def floats(rank: int, generic: bool) -> tuple[Tensor, Tensor]:
    group = replace(world_group(device_kind="cpu"), pairwise=not generic)
    x = torch.randn(1000, generator=torch.Generator().manual_seed(rank))
    return all_reduce(x.clone(), group), all_gather(reduce_scatter(x, group), group)


def test_a_pair_gets_the_same_bits_on_both_ranks_and_by_both_paths() -> None:
    results = [*ranks(2).run(floats, False), *ranks(2).run(floats, True)]
    assert all(torch.equal(part, results[0][0]) for result in results for part in result)


def in_a_subgroup(rank: int) -> tuple[tuple[int, ...], int, Tensor]:
    """Ranks 0, 2 and ranks 1, 3 apart; only members make a group."""
    group = new_group("tp", (rank % 2, rank % 2 + 2), rank, device_kind="cpu")
    return group.ranks, group.index, all_gather(torch.tensor([rank]), group)


def test_groups_of_some_ranks_do_not_meet() -> None:
    for rank, (members, index, gathered) in enumerate(ranks(4).run(in_a_subgroup)):
        assert members == (rank % 2, rank % 2 + 2) and index == rank // 2
        assert gathered.tolist() == [rank % 2, rank % 2 + 2]


def test_a_group_of_one_rank_communicates_nothing() -> None:
    group: Group = single_process_group()
    x = torch.arange(6.0)
    for function in (all_reduce, all_gather, reduce_scatter):
        result: Any = function(x, group)
        assert result is x
    out = torch.zeros(6)
    assert torch.equal(start_all_gather_into(out, x, group).wait(), x)
    assert torch.equal(start_reduce_scatter_into(torch.zeros(6), x, group).wait(), x)
