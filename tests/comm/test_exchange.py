"""Point-to-point exchanges on real gloo ranks: big messages both ways at once, tags, and buffers that must live."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from megatronish.comm.collectives import all_reduce
from megatronish.comm.exchange import Parcel, start_exchange
from megatronish.comm.groups import world_group
from tests.ranks import ranks

BIG = 4_000_000
"""Elements: 16 MB, far more than a socket buffers."""


def both_ways(rank: int) -> tuple[float, float]:
    group = world_group(device_kind="cpu")
    received = torch.empty(BIG)
    exchange = start_exchange(
        sends=[Parcel(torch.full((BIG,), float(rank)), 3)],
        receives=[Parcel(received, 3)],
        peer_index=1 - rank,
        group=group,
        device_kind="cpu",
    )
    exchange.wait_received()
    exchange.wait_sent()
    return received.min().item(), received.max().item()


def test_big_messages_in_both_directions_at_once_do_not_deadlock() -> None:
    assert ranks(2).run(both_ways, timeout=60) == [(1.0, 1.0), (0.0, 0.0)]


def by_tag(rank: int) -> list[float]:
    """Rank 0 sends tags 5, 6, 7; rank 1 asks for them in another order."""
    group = world_group(device_kind="cpu")
    if rank == 0:
        sends = [Parcel(torch.full((8,), float(tag)), tag) for tag in (5, 6, 7)]
        start_exchange(sends=sends, receives=[], peer_index=1, group=group, device_kind="cpu").wait_sent()
        return []
    receives = [Parcel(torch.empty(8), tag) for tag in (7, 5, 6)]
    start_exchange(sends=[], receives=receives, peer_index=0, group=group, device_kind="cpu").wait_received()
    return [tensor.mean().item() for tensor, _, _ in receives]


def test_messages_are_paired_by_tag() -> None:
    assert ranks(2).run(by_tag)[1] == [7.0, 5.0, 6.0]


def under_a_collective(rank: int) -> tuple[Tensor, Tensor]:
    """An exchange under way while the same two ranks sum something over the same communicator."""
    group = world_group(device_kind="cpu")
    received, total = torch.empty(1000), torch.full((1000,), float(rank + 1))
    exchange = start_exchange(
        sends=[Parcel(torch.full((1000,), 10.0 + rank), 0)],
        receives=[Parcel(received, 0)],
        peer_index=1 - rank,
        group=group,
        device_kind="cpu",
    )
    all_reduce(total, group)
    exchange.wait_received()
    exchange.wait_sent()
    return received, total


def test_an_exchange_does_not_mix_with_a_collective_of_the_same_pair() -> None:
    for rank, (received, total) in enumerate(ranks(2).run(under_a_collective)):
        assert torch.equal(received, torch.full((1000,), 11.0 - rank))
        assert torch.equal(total, torch.full((1000,), 3.0))


def chain(rank: int) -> float:
    """Each rank passes on what the one before sent, plus one; the sender drops its tensor at once."""
    group = world_group(device_kind="cpu")
    x = torch.zeros(BIG // 8)
    if rank > 0:
        start_exchange(sends=[], receives=[Parcel(x, 1)], peer_index=rank - 1, group=group, device_kind="cpu").wait_received()
    if rank < group.size - 1:
        exchange = start_exchange(sends=[Parcel(x + 1, 1)], receives=[], peer_index=rank + 1, group=group, device_kind="cpu")
        gc.collect()
        for _ in range(4):
            torch.full_like(x, -1.0)  # would reuse the memory of a freed message
        exchange.wait_sent()
    return (x.min() + x.max()).item() / 2


def test_a_message_lives_until_it_is_sent() -> None:
    assert ranks(4).run(chain) == [0.0, 1.0, 2.0, 3.0]
