"""A group of ranks, passed as an argument to whatever communicates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Group:
    """The ranks along one mesh axis that hold this rank."""

    axis: str
    ranks: tuple[int, ...]
    """Global ranks, in the order of the axis."""
    index: int
    """Position of this rank in `ranks`."""
    handle: dist.ProcessGroup | None = None
    """None exactly if the group has one rank: then nothing is communicated."""
    pairwise: bool = False
    """Two ranks on CPU: collectives are one exchange (see `collectives.py`)."""

    @property
    def size(self) -> int:
        return len(self.ranks)


def single_process_group(axis: str = "world", rank: int = 0) -> Group:
    """A group of one rank."""
    return Group(axis, (rank,), 0)


def new_group(axis: str, ranks: Sequence[int], rank: int, *, device_kind: str) -> Group:
    """Create the communicator of `ranks`. Only its members call this (so a rank belongs to O(axes) groups, never O(world))."""
    ranks = tuple(ranks)
    if len(ranks) == 1:
        return Group(axis, ranks, 0)
    handle = dist.new_group(list(ranks), use_local_synchronization=True, group_desc=axis)
    pairwise = len(ranks) == 2 and device_kind == "cpu"
    return Group(axis, ranks, ranks.index(rank), handle, pairwise)


def world_group(*, device_kind: str) -> Group:
    """Every rank of the job; a group of one where no process group was initialised."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return single_process_group()
    size = dist.get_world_size()
    return Group("world", tuple(range(size)), dist.get_rank(), dist.group.WORLD, size == 2 and device_kind == "cpu")
