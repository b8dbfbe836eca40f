"""Point-to-point: one batch of sends and receives with one neighbour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor

from megatronish.comm import history
from megatronish.comm.groups import Group
from megatronish.comm.history import Started, Waits


class Parcel(NamedTuple):
    """One tensor of an exchange."""

    tensor: Tensor
    tag: int
    what: str = ""


@dataclass
class PendingExchange:
    """Sends and receives under way. A sent tensor must not be freed or written while gloo still reads it: it is held here."""

    sends: list[tuple[Started, Tensor]]
    receives: list[Started]

    def wait_received(self) -> None:
        """The received tensors may be used by what follows on this device."""
        for work in self.receives:
            work.wait()
        self.receives = []

    def wait_sent(self) -> None:
        """The sent tensors may be freed."""
        for work, _ in self.sends:
            work.wait()
        self.sends = []


class Post(Protocol):
    """Hands one batch of messages to torch.distributed; one work for each, receives first, or one for all."""

    def __call__(self, sends: Sequence[Parcel], receives: Sequence[Parcel], peer: int, group: Group) -> Sequence[Waits]: ...


def post_batch(sends: Sequence[Parcel], receives: Sequence[Parcel], peer: int, group: Group) -> Sequence[Waits]:
    """See Post. Coalesced: for NCCL."""
    operations: list[Any] = [dist.P2POp(dist.irecv, parcel.tensor, peer, group.handle) for parcel in receives]
    operations += [dist.P2POp(dist.isend, parcel.tensor, peer, group.handle) for parcel in sends]
    return dist.batch_isend_irecv(operations)


def post_by_tag(sends: Sequence[Parcel], receives: Sequence[Parcel], peer: int, group: Group) -> Sequence[Waits]:
    """See Post. For gloo, which pairs messages by tag. Receives first: a posted one lets gloo write straight into the tensor."""
    works = [dist.irecv(parcel.tensor, peer, group=group.handle, tag=parcel.tag) for parcel in receives]
    works += [dist.isend(parcel.tensor, peer, group=group.handle, tag=parcel.tag) for parcel in sends]
    return [work for work in works if work is not None]


def start_exchange(
    *,
    sends: Sequence[Parcel],
    receives: Sequence[Parcel],
    peer_index: int,
    group: Group,
    device_kind: str,
    post: Post | None = None,
) -> PendingExchange:
    """Send to and receive from the rank at `peer_index` of `group`, as one batch.

    The peer must call this with the matching lists. On NCCL the batch is one coalesced call, so neither side's order inside it
    matters; gloo pairs messages by tag. `post`: what hands them on instead of torch.distributed, in a rehearsal.
    """
    peer = group.ranks[peer_index]
    record = history.current()
    batch = record.next_batch(group.axis)

    def note(operation: str, parcel: Parcel) -> int:
        return group.note(operation, parcel.tensor, peer=peer_index, tag=parcel.tag, batch=batch, what=parcel.what)

    numbers = [note("receive", parcel) for parcel in receives] + [note("send", parcel) for parcel in sends]
    if post is not None:  # torch.distributed will not see these, and must not take others for them
        record.num_announced[group.axis] -= len(numbers)
    post = post or (post_by_tag if device_kind == "cpu" else post_batch)
    works = post(sends, receives, peer, group)
    started = [group.started(work, number) for work, number in zip(works, numbers[-len(works) :], strict=True)]
    if device_kind == "cpu":
        sent = [(work, parcel.tensor) for work, parcel in zip(started[len(receives) :], sends, strict=True)]
        return PendingExchange(sent, started[: len(receives)])
    # One coalesced work stands for the whole batch: hold the sent tensors until it is done. What follows on this device need not
    # wait for a batch that only sends: it computes on until the peer comes to it.
    return PendingExchange([(started[-1], parcel.tensor) for parcel in sends], started if receives else [])
