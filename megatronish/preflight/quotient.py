"""Ranks that cannot be told apart: one of each class stands for all when the order of calls is simulated.

Two ranks are of one class if their logs have one structure (operation, group, batch and partner of every event; not its size or
reason), and, for every group, the classes among their fellow members are the same set, and the partner at each place they exchange
with is of the same class, round after round until nothing changes any more.

Why one stands for all, under every rule of `order.py`. The rules have no races: what can happen stays able to happen, so the state
that is reached in the end does not depend on the order. Let all ranks of a class be at the same place. (1) If the representatives
of a set of classes can do a collective together, so can the members of *each* of the real groups: each has members of exactly those
classes (the sets that two classes see are equal or disjoint, since a fellow member sees the same set), all at that call. (2) If two
representatives can exchange, so can each rank of one class with its own partner in the other. So a step of the representatives is a
step of all ranks, after which a class is again at one place. (3) If no representative can go on, none of its class can: it waits
for a fellow member or partner whose class has not come. So the job ends if and only if the representatives do. It holds for `world`
and `ends` as for any group: the one has all classes, the other those of the first and the last stage.

A collective among ranks of one class only can always be done, so it is left out; under the rules with streams it also adds no wait:
whatever waits for it waits already for everything that it waited for, which are earlier waits of the same ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megatronish.preflight.coding import CodedJob, Table


class _Use(NamedTuple):
    """What a structure does with its groups."""

    groups: tuple[str, ...]
    """Those that it calls on."""
    edges: tuple[tuple[str, int], ...]
    """(group, place of the partner) of its messages."""


class Quotient:
    """The classes of a job's ranks."""

    def __init__(self, coded: CodedJob, *, every_rank: bool = False) -> None:
        """every_rank: one class a rank, for a check of all this."""
        self.coded = coded
        self.job = coded.job
        self._uses = {structure: self._use(structure) for structure in set(coded.structures)}
        self.class_of: list[int] = list(range(self.job.num_ranks)) if every_rank else self._refined()
        self.ranks_of: defaultdict[int, list[int]] = defaultdict(list)
        for rank, number in enumerate(self.class_of):
            self.ranks_of[number].append(rank)
        self.num_classes = len(self.ranks_of)

    def structure(self, number: int) -> int:
        """The structure of a class."""
        return self.structure_of_rank(self.ranks_of[number][0])

    def structure_of_rank(self, rank: int) -> int:
        return self.coded.structures[self.job.log_of[rank]]

    @cached_property
    def fellows(self) -> list[Mapping[str, tuple[int, ...]]]:
        """By class: group -> the classes in it; without groups of one class, whose calls are left out."""
        seen: dict[tuple[int, ...], tuple[int, ...]] = {}
        found: list[Mapping[str, tuple[int, ...]]] = []
        for number in range(self.num_classes):
            rank = self.ranks_of[number][0]
            mine: dict[str, tuple[int, ...]] = {}
            for group in self._uses[self.structure(number)].groups:
                ranks = self.job.groups[rank][group]
                if ranks not in seen:
                    seen[ranks] = tuple(sorted({self.class_of[other] for other in ranks}))
                if len(seen[ranks]) > 1:
                    mine[group] = seen[ranks]
            found.append(mine)
        return found

    def partner(self, number: int, group: str, peer: int) -> int:
        """The class at a place of a class's group."""
        return self.class_of[self.job.groups[self.ranks_of[number][0]][group][peer]]

    def _use(self, structure: int) -> _Use:
        ops = [self.coded.ops.items[code] for code in np.unique(self.coded.codes(structure))]
        return _Use(
            tuple(sorted({op.group for op in ops if op.kind != "wait"})),
            tuple(sorted({(op.group, op.peer) for op in ops if op.kind == "unit"})),
        )

    def _refined(self) -> list[int]:
        job, uses = self.job, [self._uses[self.structure_of_rank(rank)] for rank in range(self.job.num_ranks)]
        first: Table[tuple[int, tuple[int, ...]]] = Table()
        # A rank's own place is part of what its partner sees.
        colors = [
            first.number((self.structure_of_rank(rank), tuple(job.groups[rank][group].index(rank) for group, _ in use.edges)))
            for rank, use in enumerate(uses)
        ]
        members: dict[tuple[str, int], tuple[int, ...]] = {}
        instances: list[list[tuple[int, ...]]] = []
        by_value: dict[tuple[int, ...], tuple[int, ...]] = {}
        for rank, use in enumerate(uses):
            mine = []
            for group in use.groups:
                ranks = job.groups[rank][group]
                key = (group, id(ranks))
                if key not in members:
                    members[key] = by_value.setdefault(ranks, ranks)
                mine.append(members[key])
            instances.append(mine)
        while True:
            sets: Table[frozenset[int]] = Table()
            set_of = {id(ranks): sets.number(frozenset(colors[rank] for rank in ranks)) for ranks in by_value.values()}
            table: Table[tuple[int, ...]] = Table()
            finer = [
                table.number(
                    (
                        colors[rank],
                        *(set_of[id(ranks)] for ranks in instances[rank]),
                        *(colors[job.groups[rank][group][peer]] for group, peer in use.edges),
                    )
                )
                for rank, use in enumerate(uses)
            ]
            if len(table.items) == len(set(colors)):
                return finer
            colors = finer
