"""Point-to-point: one batch of sends and receives with one neighbour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from megatronish.comm import history
from megatronish.comm.groups import Group
from megatronish.comm.history import Started


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


def start_exchange(
    *, sends: Sequence[Parcel], receives: Sequence[Parcel], peer_index: int, group: Group, device_kind: str
) -> PendingExchange:
    """Send to and receive from the rank at `peer_index` of `group`, as one batch.

    The peer must call this with the matching lists. On NCCL the batch is one coalesced call, so neither side's order inside it
    matters; gloo pairs messages by tag.
    """
    peer = group.ranks[peer_index]
    batch = history.current().next_batch(group.axis)

    def note(operation: str, parcel: Parcel) -> int:
        return group.note(operation, parcel.tensor, peer=peer_index, tag=parcel.tag, batch=batch, what=parcel.what)

    if device_kind == "cpu":
        # Receives first: a posted receive lets gloo write straight into the tensor.
        received, sent = [], []
        for parcel in receives:
            number = note("receive", parcel)
            received.append(group.started(dist.irecv(parcel.tensor, peer, group=group.handle, tag=parcel.tag), number))
        for parcel in sends:
            number = note("send", parcel)
            work = dist.isend(parcel.tensor, peer, group=group.handle, tag=parcel.tag)
            sent.append((group.started(work, number), parcel.tensor))
        return PendingExchange(sent, received)
    numbers = [note("receive", parcel) for parcel in receives] + [note("send", parcel) for parcel in sends]
    operations: list[Any] = [dist.P2POp(dist.irecv, parcel.tensor, peer, group.handle) for parcel in receives]
    operations += [dist.P2POp(dist.isend, parcel.tensor, peer, group.handle) for parcel in sends]
    works = dist.batch_isend_irecv(operations)
    # One coalesced work stands for the whole batch: hold the sent tensors until it is done. What follows on this device need not
    # wait for a batch that only sends: it computes on until the peer comes to it.
    started = [group.started(work, number) for work, number in zip(works, numbers[-len(works) :], strict=True)]
    return PendingExchange([(started[-1], parcel.tensor) for parcel in sends], started if receives else [])
