"""The mesh: this rank's coordinates on the axes pp, dp, cp, ep, tp (tp innermost) and its group along each.

The only place where a global rank becomes coordinates. `cp` (context) and `ep` (expert) are axes of size 1: seams for later.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatronish.comm import Group, all_reduce, new_group
from megatronish.comm.groups import world_group

AXES = ("pp", "dp", "cp", "ep", "tp")


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the axes, outermost first, and the arithmetic between ranks and coordinates."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    tp: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def num_ranks(self) -> int:
        return math.prod(self.sizes)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Rank -> its index on each axis."""
        result = {}
        for axis, size in zip(reversed(AXES), reversed(self.sizes), strict=True):
            rank, result[axis] = divmod(rank, size)
        return {axis: result[axis] for axis in AXES}

    def rank_of(self, coordinates: Mapping[str, int]) -> int:
        """The inverse; axes that are not named are 0."""
        rank = 0
        for axis, size in zip(AXES, self.sizes, strict=True):
            rank = rank * size + coordinates.get(axis, 0)
        return rank

    def describe(self, rank: int) -> str:
        """Coordinates for log lines, e.g. `pp0 dp1 tp0`."""
        here = self.coordinates(rank)
        return " ".join(f"{axis}{here[axis]}" for axis in AXES if axis in ("pp", "dp", "tp") or getattr(self, axis) > 1)

    def ranks_along(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` on `axis` only, in order."""
        here = self.coordinates(rank)
        return tuple(self.rank_of({**here, axis: i}) for i in range(getattr(self, axis)))


@dataclass(frozen=True)
class Mesh:
    """A rank's place. Control flow asks `device_kind`, never a tensor: a rehearsal says "cuda" on meta tensors."""

    shape: MeshShape
    rank: int
    groups: Mapping[str, Group]
    """By axis, "world", and on the ranks of the first and the last stage "ends": those two of this rank's pipeline."""
    device: torch.device
    device_kind: str

    def size(self, axis: str) -> int:
        return self.groups[axis].size

    def index(self, axis: str) -> int:
        return self.groups[axis].index

    @property
    def is_first_stage(self) -> bool:
        return self.index("pp") == 0

    @property
    def is_last_stage(self) -> bool:
        return self.index("pp") == self.size("pp") - 1

    def describe(self) -> str:
        """Coordinates for log lines, e.g. `pp0 dp1 tp0`."""
        return self.shape.describe(self.rank)


def build_mesh(
    shape: MeshShape, rank: int, *, device: torch.device, device_kind: str | None = None, timeout_seconds: float = 600.0
) -> Mesh:
    """Create this rank's groups, axis by axis in one fixed order. Every rank of the job must call it. A collective that some rank
    does not join gives up after `timeout_seconds`."""
    kind, timeout = device_kind or device.type, datetime.timedelta(seconds=timeout_seconds)
    groups = {"world": world_group(device_kind=kind)}
    members = {axis: shape.ranks_along(axis, rank) for axis in AXES}
    stages = members["pp"]
    if rank in (stages[0], stages[-1]):
        members["ends"] = tuple(sorted({stages[0], stages[-1]}))
    for axis, its_ranks in members.items():
        groups[axis] = new_group(axis, its_ranks, rank, device_kind=kind, timeout=timeout)
        # Opened at once and by all members: NCCL builds a communicator at its first call, which must not be a pipeline's exchange
        # between two of them.
        all_reduce(torch.zeros(1, device=device), groups[axis], what="first call")
    return Mesh(shape, rank, groups, device, kind)
