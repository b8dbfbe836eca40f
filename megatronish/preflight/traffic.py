"""How much the ranks of a job communicate: calls and bytes by phase, group and operation, and who sends how much to whom.

Two measures. Bytes *handed over*: what one rank gives the backend as input of a call, or takes as output of a receive. Bytes
*sent*: what leaves the rank if a collective on n ranks runs as a ring, (n - 1) / n of the input for a reduce_scatter, n - 1 times
the input for an all_gather, 2 (n - 1) / n of it for an all_reduce (Patarasuk and Yuan 2009). A backend may choose trees instead.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch

from megatronish.comm.history import Call, Event, Moment, Read, Wait
from megatronish.preflight.job import Job, Log

STEP = "train"
"""The phase whose steps are counted each by itself."""


class Use(NamedTuple):
    """What a call is counted under."""

    group: str
    operation: str


class Amount(NamedTuple):
    """Of one rank."""

    calls: int = 0
    handed_bytes: int = 0
    sent_bytes: int = 0

    def plus(self, other: Amount, times: int = 1) -> Amount:
        """times: how often `other` is added."""
        return Amount(
            self.calls + times * other.calls,
            self.handed_bytes + times * other.handed_bytes,
            self.sent_bytes + times * other.sent_bytes,
        )


@cache
def bytes_of(dtype: str) -> int:
    """Of one element; 0 for a call without a tensor."""
    return getattr(torch, dtype).itemsize if dtype else 0


def handed_bytes(call: Call) -> int:
    """Bytes that the call takes of this rank, or gives it for a receive."""
    return call.num_elements * bytes_of(call.dtype)


def sent_bytes(call: Call, size: int) -> int:
    """Bytes that leave this rank, on a group of `size`; collectives as rings."""
    given = handed_bytes(call)
    if call.operation == "all_reduce":
        return 2 * given * (size - 1) // size
    if call.operation == "reduce_scatter":
        return given * (size - 1) // size
    if call.operation == "all_gather":
        return given * (size - 1)
    return given if call.operation == "send" else 0


@dataclass
class Tally:
    """What some events come to."""

    uses: dict[Use, Amount] = field(default_factory=dict)
    sends: dict[tuple[str, int], int] = field(default_factory=dict)
    """(group, place of the receiver) -> bytes of messages."""
    rings: dict[str, int] = field(default_factory=dict)
    """Group -> bytes of collectives sent to the next place."""
    num_waits: int = 0
    num_reads: int = 0

    def add(self, other: Tally, times: int = 1) -> None:
        for use, amount in other.uses.items():
            self.uses[use] = self.uses.get(use, Amount()).plus(amount, times)
        for target, given in other.sends.items():
            self.sends[target] = self.sends.get(target, 0) + times * given
        for group, given in other.rings.items():
            self.rings[group] = self.rings.get(group, 0) + times * given
        self.num_waits += times * other.num_waits
        self.num_reads += times * other.num_reads


def tally(events: Iterable[Event], sizes: Mapping[str, int]) -> Tally:
    """sizes: ranks of each group."""
    result = Tally()
    for event in events:
        if isinstance(event, Wait):
            result.num_waits += 1
        elif isinstance(event, Read):
            result.num_reads += 1
        else:
            sent = sent_bytes(event, sizes.get(event.group, 1))
            use = Use(event.group, event.operation)
            result.uses[use] = result.uses.get(use, Amount()).plus(Amount(1, handed_bytes(event), sent))
            if event.peer is None:
                result.rings[event.group] = result.rings.get(event.group, 0) + sent
            elif event.operation == "send":
                target = (event.group, event.peer)
                result.sends[target] = result.sends.get(target, 0) + sent
    return result


class Tallies:
    """`tally`, once for events that come to the same."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self._known: dict[int, tuple[tuple[Event, ...], Tally]] = {}  # holds the tuples too, so that no id comes twice
        self._alike: dict[tuple[object, ...], Tally] = {}

    def of(self, events: tuple[Event, ...]) -> Tally:
        """Not to be changed by the caller."""
        known = self._known.get(id(events))
        if known is None:
            # Without tags and names, which make each message of a pipeline another.
            key = tuple((e.group, e.operation, e.num_elements, e.dtype, e.peer) if isinstance(e, Call) else type(e) for e in events)
            if key not in self._alike:
                self._alike[key] = tally(events, self.sizes)
            known = self._known[id(events)] = events, self._alike[key]
        return known[1]


def label_of(moment: Moment) -> str:
    """The phase; each training step by itself."""
    return f"{STEP} step {moment.step}" if moment.phase == STEP else moment.phase


def by_phase(log: Log, tallies: Tallies) -> dict[str, Tally]:
    """What a log comes to, by `label_of`, in the order of the run."""
    times: defaultdict[str, Counter[int]] = defaultdict(Counter)
    parts: dict[int, Tally] = {}
    for moment, events, _ in log.spans:
        part = tallies.of(events)
        parts[id(part)] = part
        times[label_of(moment)][id(part)] += 1
    result: dict[str, Tally] = {}
    for label, counts in times.items():
        result[label] = total = Tally()
        for key, number in counts.items():
            total.add(parts[key], number)
    return result


def group_sizes(job: Job, rank: int) -> dict[str, int]:
    """Ranks of each of this rank's groups."""
    return {group: len(ranks) for group, ranks in job.groups[rank].items()}


@dataclass(frozen=True)
class Traffic:
    """What a whole job communicates."""

    job: Job
    of_log: list[dict[str, Tally]]
    """By log: `by_phase`."""
    ranks_with: list[list[int]]
    """By log: its ranks."""

    @property
    def phases(self) -> list[str]:
        """In the order of the run."""
        return list(dict.fromkeys(label for phases in self.of_log for label in phases))

    @property
    def last_step(self) -> str:
        """The phase of the last recorded training step; empty if there is none."""
        return next((label for label in reversed(self.phases) if label.startswith(f"{STEP} step")), "")

    def of_rank(self, rank: int, phase: str) -> Tally:
        return self.of_log[self.job.log_of[rank]].get(phase, Tally())

    def edges(self, phase: str) -> Iterator[tuple[int, int, str, int]]:
        """(sender, receiver, group, bytes): messages to their receivers, collectives to the next place of the group."""
        for rank, groups in enumerate(self.job.groups):
            done = self.of_rank(rank, phase)
            messages = [(group, peer, given) for (group, peer), given in done.sends.items()]
            for group, peer, given in [*((group, None, given) for group, given in done.rings.items()), *messages]:
                ranks = groups.get(group, ())
                if not given or rank not in ranks:
                    continue
                to = (ranks.index(rank) + 1) % len(ranks) if peer is None else peer
                if to < len(ranks):
                    yield rank, ranks[to], group, given


def traffic_of(job: Job) -> Traffic:
    """Every log, once."""
    ranks_with: list[list[int]] = [[] for _ in job.logs]
    for rank, log in enumerate(job.log_of):
        ranks_with[log].append(rank)
    of_log = [
        by_phase(log, Tallies(group_sizes(job, ranks[0]))) if ranks else {} for log, ranks in zip(job.logs, ranks_with, strict=True)
    ]
    return Traffic(job, of_log, ranks_with)
