"""What a job's ranks communicate: a few distinct logs, and which rank has which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatronish.comm.history import Call, Event, Moment
from megatronish.parallel.mesh import MeshShape


class Span(NamedTuple):
    """Events of one moment, in order. Equal spans of a log, and of all logs of a job, share one tuple of events."""

    moment: Moment
    events: tuple[Event, ...]
    is_inferred: bool = False
    """Not run: the same action was, twice, for other microbatches of the same phase of the schedule, with equal events."""


@dataclass(frozen=True)
class Log:
    """The history of one rank, and of all that differ from it in their coordinates alone."""

    spans: Sequence[Span]

    def events(self) -> Iterator[tuple[Moment, Event]]:
        """Every event in order."""
        for moment, events, _ in self.spans:
            for event in events:
                yield moment, event

    def calls(self) -> Iterator[tuple[Moment, Call]]:
        """Every call in order."""
        return ((moment, event) for moment, event in self.events() if isinstance(event, Call))


@dataclass(frozen=True)
class Job:
    """Every rank's log."""

    shape: MeshShape
    logs: Sequence[Log]
    log_of: Sequence[int]
    """By rank: its log's place in `logs`."""
    groups: Sequence[Mapping[str, tuple[int, ...]]]
    """By rank: group name -> its global ranks, in the order of places."""
    num_run: int = 0
    """Ranks that were rehearsed; all others were inferred."""

    @property
    def num_ranks(self) -> int:
        return len(self.log_of)

    def log(self, rank: int) -> Log:
        return self.logs[self.log_of[rank]]

    def name(self, rank: int) -> str:
        """E.g. `rank 517 [pp4 dp0 tp5]`."""
        return f"rank {rank} [{self.shape.describe(rank)}]"
