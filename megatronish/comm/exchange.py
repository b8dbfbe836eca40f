"""Point-to-point: one batch of sends and receives with one neighbour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatronish.comm.groups import Group


@dataclass
class PendingExchange:
    """Sends and receives under way. A sent tensor must not be freed or written while gloo still reads it: it is held here."""

    sends: list[tuple[dist.Work, Tensor]]
    receives: list[dist.Work]

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
    *, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], peer_index: int, group: Group, device_kind: str
) -> PendingExchange:
    """Send and receive (tensor, tag) pairs with the rank at `peer_index` of `group`, as one batch.

    The peer must call this with the matching lists. On NCCL the batch is one coalesced call, so neither side's order inside it
    matters; gloo pairs messages by tag.
    """
    peer = group.ranks[peer_index]
    if device_kind == "cpu":
        # Receives first: a posted receive lets gloo write straight into the tensor.
        received = [dist.irecv(t, peer, group=group.handle, tag=tag) for t, tag in receives]
        sent = [(dist.isend(t, peer, group=group.handle, tag=tag), t) for t, tag in sends]
        return PendingExchange([(w, t) for w, t in sent if w is not None], [w for w in received if w is not None])
    operations = [dist.P2POp(dist.irecv, t, peer, group.handle) for t, _ in receives]
    operations += [dist.P2POp(dist.isend, t, peer, group.handle) for t, _ in sends]
    works = dist.batch_isend_irecv(operations)
    # One coalesced work stands for the whole batch: hold the sent tensors until it is done. What follows on this device need not
    # wait for a batch that only sends: it computes on until the peer comes to it.
    return PendingExchange([(works[-1], t) for t, _ in sends], list(works) if receives else [])
