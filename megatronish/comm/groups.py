"""A group of ranks, passed as an argument to whatever communicates."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatronish.comm import history
from megatronish.comm.history import Call, Started, Waits
from megatronish.comm.streams import backend_of


@dataclass(frozen=True)
class Group:
    """The ranks along one mesh axis that hold this rank."""

    axis: str
    ranks: tuple[int, ...]
    """Global ranks, in the order of the axis: a rank's place in the group."""
    index: int
    """Place of this rank."""
    handle: dist.ProcessGroup | None = None
    """None exactly if the group has one rank: then nothing is communicated."""
    pairwise: bool = False
    """Two ranks on CPU: collectives are one exchange (see `collectives.py`)."""

    @property
    def size(self) -> int:
        return len(self.ranks)

    def note(self, operation: str, x: Tensor | None = None, **more: Any) -> int:
        """Put a call that is about to be made into this process's history; its number. `more`: see `history.Call`."""
        size: dict[str, Any] = {} if x is None else {"num_elements": x.numel(), "dtype": _name_of(x.dtype)}
        return history.current().call(Call(operation, self.axis, **size, **more))

    def started(self, work: Waits | None, number: int) -> Started:
        """The call of that number, under way."""
        assert work is not None, "torch.distributed gives none to a rank outside the group"
        return Started(work, self.axis, number)


def single_process_group(axis: str = "world", rank: int = 0) -> Group:
    """A group of one rank."""
    return Group(axis, (rank,), 0)


def lone_communicator(device_kind: str) -> dist.ProcessGroup:
    """torch's group of this process alone, for what insists on one."""
    if not dist.is_initialized():
        dist.init_process_group(backend_of(device_kind), store=dist.HashStore(), rank=0, world_size=1)
    world = dist.group.WORLD
    assert world is not None
    return world


def new_group(axis: str, ranks: Sequence[int], rank: int, *, device_kind: str, timeout: datetime.timedelta | None = None) -> Group:
    """Create the communicator of `ranks`. Only its members call this (so a rank belongs to O(axes) groups, never O(world)). Its
    collectives give up after `timeout`; when not given after what torch has for the backend: 10 minutes, 30 for gloo."""
    ranks = tuple(ranks)
    if len(ranks) == 1:
        return Group(axis, ranks, 0)
    history.current().open(axis, ranks)
    handle = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True, group_desc=axis)
    pairwise = len(ranks) == 2 and device_kind == "cpu"
    return Group(axis, ranks, ranks.index(rank), handle, pairwise)


def communicator(group: Group, *, device_kind: str) -> dist.ProcessGroup:
    """torch's process group of `group`, for a library that communicates by itself; a real one for a group of one rank too. Where
    the job is one process, torch.distributed is initialised for it. All members call it."""
    if group.handle is not None:
        return group.handle
    if not dist.is_initialized():
        dist.init_process_group(backend_of(device_kind), store=dist.HashStore(), rank=0, world_size=1)
    return dist.new_group(list(group.ranks), use_local_synchronization=True, group_desc=group.axis)


def world_group(*, device_kind: str) -> Group:
    """Every rank of the job; a group of one where no process group was initialised."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return single_process_group()
    size = dist.get_world_size()
    if "world" not in history.current().groups:
        history.current().open("world", tuple(range(size)))
    return Group("world", tuple(range(size)), dist.get_rank(), dist.group.WORLD, size == 2 and device_kind == "cpu")


@cache
def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
