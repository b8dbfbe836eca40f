"""Logs as strings of numbers: each distinct call gets a number, each distinct span is read once, and a log is, for every group, the
numbers of its calls as bytes. Logs that agree on a group have equal bytes there, and equal bytes share one program number: a job of
thousands of ranks is compared by comparing a few hundred small integers, and nothing is hashed that could collide."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt

from megatronish.comm.history import Call, Event, Moment, Wait
from megatronish.preflight.job import Job

Item = TypeVar("Item", bound=Hashable)
Codes = npt.NDArray[np.uint32]


class Table(Generic[Item]):
    """Numbers for distinct items, from 0 in the order of their first appearance."""

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self.items: list[Item] = []
        self._numbers: dict[Item, int] = {}
        for item in items:
            self.number(item)

    def number(self, item: Item) -> int:
        number = self._numbers.get(item)
        if number is None:
            number = self._numbers[item] = len(self.items)
            self.items.append(item)
        return number


class Collective(NamedTuple):
    """What all members of a group must agree on."""

    operation: str
    dtype: str
    num_elements: int
    reduce_op: str
    what: str
    """What it is for: two calls of one size for two things would mix them up in silence."""


class Message(NamedTuple):
    """What both ends of a message must agree on."""

    num_elements: int
    dtype: str
    tag: int
    what: str


class Unit(NamedTuple):
    """The messages that one rank posts as one: a batch, or one message alone."""

    is_batch: bool
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]

    def mirrored(self) -> Unit:
        """The partner's side."""
        return Unit(self.is_batch, self.receives, self.sends)


class Op(NamedTuple):
    """What decides in which order things can happen: an event without its size and its reason."""

    kind: str
    """collective, blocking (a collective that the host waits for: open, barrier), unit, or wait."""
    group: str
    back: int = 0
    """Of a wait: as in `Wait`."""
    peer: int = -1
    """Of a unit: place in the group."""
    is_batch: bool = False
    messages: tuple[tuple[bool, int], ...] = ()
    """Of a unit: (it is a send, tag) of each message, in the order of the calls."""

    @property
    def num_calls(self) -> int:
        """How many of the group's calls this is."""
        return len(self.messages) if self.kind == "unit" else int(self.kind != "wait")


BLOCKING = ("open", "barrier")
MESSAGES = ("send", "receive")


def is_message(event: Event) -> bool:
    """A send or a receive."""
    return isinstance(event, Call) and event.operation in MESSAGES


def units_of(events: Sequence[Event]) -> Iterator[tuple[int, tuple[Call, ...]]]:
    """(place of its first call, its calls) for each unit of a span. The calls of a batch stand together and in one span."""
    position = 0
    while position < len(events):
        end = position + 1
        if is_message(events[position]):
            end = _end_of_unit(events, position)
            yield position, cast(tuple[Call, ...], tuple(events[position:end]))
        position = end


def _end_of_unit(events: Sequence[Event], position: int) -> int:
    first = events[position]
    assert isinstance(first, Call)
    position += 1
    if first.batch:
        while position < len(events):
            event = events[position]
            if not isinstance(event, Call) or event.batch != first.batch or (event.group, event.peer) != (first.group, first.peer):
                break
            position += 1
    return position


def collective_of(call: Call) -> Collective:
    """What all members must do."""
    return Collective(call.operation, call.dtype, call.num_elements, call.reduce_op, call.what)


def message_of(call: Call) -> Message:
    """What the other end must expect."""
    return Message(call.num_elements, call.dtype, call.tag, call.what)


def unit_of(calls: Sequence[Call]) -> Unit:
    """What the partner must mirror."""
    sends = tuple([message_of(call) for call in calls if call.operation == "send"])
    receives = tuple([message_of(call) for call in calls if call.operation == "receive"])
    return Unit(calls[0].batch > 0, sends, receives)


class _Span(NamedTuple):
    """A span's events as numbers."""

    collectives: dict[str, bytes]
    units: dict[tuple[str, int], bytes]
    """By group and place of the partner."""
    ops: bytes


class CodedJob:
    """Every log of a job as numbers."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.signatures: Table[Collective] = Table()
        self.unit_table: Table[Unit] = Table()
        self.ops: Table[Op] = Table()
        self.programs: Table[bytes] = Table([b""])
        """Whatever equal strings of numbers mean, they share a number; 0 is that of the empty one."""
        self.collectives: list[dict[str, int]] = []
        """By log: group -> program of `signatures`."""
        self.units: list[dict[tuple[str, int], int]] = []
        """By log: (group, place of the partner) -> program of `unit_table`."""
        self.structures: list[int] = []
        """By log: program of `ops`, of all its groups together."""
        self.num_calls: list[int] = []
        """By log."""
        # The tuples are kept with their numbers: an id is an id only as long as its object lives.
        self._spans: dict[int, tuple[Sequence[Event], _Span, int]] = {}
        for log in job.logs:
            self._add_log([self._span(span.events) for span in log.spans])
        self._spans.clear()

    def codes(self, program: int) -> Codes:
        """A program's numbers."""
        return np.frombuffer(self.programs.items[program], dtype=np.uint32)

    def collective_program(self, rank: int, group: str) -> int:
        return self.collectives[self.job.log_of[rank]].get(group, 0)

    def unit_program(self, rank: int, group: str, peer: int) -> int:
        return self.units[self.job.log_of[rank]].get((group, peer), 0)

    @cached_property
    def mirror(self) -> Codes:
        """By number of a unit: the number of the partner's side."""
        units = list(self.unit_table.items)
        return np.array([self.unit_table.number(unit.mirrored()) for unit in units], dtype=np.uint32)

    @cached_property
    def op_groups(self) -> tuple[Table[str], npt.NDArray[np.int64]]:
        """All groups, and by number of an op the number of its group."""
        groups: Table[str] = Table()
        return groups, np.array([groups.number(op.group) for op in self.ops.items], dtype=np.int64)

    @cached_property
    def op_kinds(self) -> npt.NDArray[np.str_]:
        """By number of an op: its kind."""
        return np.array([op.kind for op in self.ops.items], dtype=np.str_)

    def slots(self, groups: Sequence[str]) -> npt.NDArray[np.int64]:
        """By number of an op: the place of its group among these, -1 if it is none of them."""
        table, of_op = self.op_groups
        places = {group: place for place, group in enumerate(groups)}
        by_group = np.array([places.get(group, -1) for group in table.items] or [-1], dtype=np.int64)
        return by_group[of_op]

    @cached_property
    def ranks_with(self) -> Counter[int]:
        """By log: how many ranks have it."""
        return Counter(self.job.log_of)

    def _add_log(self, spans: Sequence[tuple[_Span, int]]) -> None:
        collectives: defaultdict[str, list[bytes]] = defaultdict(list)
        units: defaultdict[tuple[str, int], list[bytes]] = defaultdict(list)
        for span, _ in spans:
            for group, codes in span.collectives.items():
                collectives[group].append(codes)
            for edge, codes in span.units.items():
                units[edge].append(codes)
        number = self.programs.number
        self.collectives.append({group: number(b"".join(parts)) for group, parts in collectives.items()})
        self.units.append({edge: number(b"".join(parts)) for edge, parts in units.items()})
        self.structures.append(number(b"".join(span.ops for span, _ in spans)))
        self.num_calls.append(sum(num_calls for _, num_calls in spans))

    def _span(self, events: tuple[Event, ...]) -> tuple[_Span, int]:
        known = self._spans.get(id(events))
        if known is None:
            span, num_calls = self._code(events)
            known = self._spans[id(events)] = (events, span, num_calls)
        return known[1:]

    def _code(self, events: Sequence[Event]) -> tuple[_Span, int]:
        collectives: dict[str, list[int]] = {}
        units: dict[tuple[str, int], list[int]] = {}
        ops: list[int] = []
        position, num_calls = 0, 0
        while position < len(events):
            event = events[position]
            position += 1
            if event.__class__ is Wait:
                ops.append(self.ops.number(Op("wait", event.group, event.back)))
            elif not isinstance(event, Call):
                continue
            elif event.operation in MESSAGES:
                end = _end_of_unit(events, position - 1)
                calls = cast(Sequence[Call], events[position - 1 : end])
                edge = (event.group, -1 if event.peer is None else event.peer)
                units.setdefault(edge, []).append(self.unit_table.number(unit_of(calls)))
                messages = tuple([(call.operation == "send", call.tag) for call in calls])
                ops.append(self.ops.number(Op("unit", event.group, 0, edge[1], event.batch > 0, messages)))
                num_calls += len(calls)
                position = end
            else:
                signature = collective_of(event)
                collectives.setdefault(event.group, []).append(self.signatures.number(signature))
                ops.append(self.ops.number(Op("blocking" if event.operation in BLOCKING else "collective", event.group)))
                num_calls += 1
        coded = _Span(
            {group: _bytes(numbers) for group, numbers in collectives.items()},
            {edge: _bytes(numbers) for edge, numbers in units.items()},
            _bytes(ops),
        )
        return coded, num_calls


def _bytes(numbers: Sequence[int]) -> bytes:
    return array("I", numbers).tobytes()


class Done(NamedTuple):
    """Something a rank does: one collective, the calls of a unit, or a wait."""

    position: int
    """Of its first event in the log."""
    moment: Moment
    calls: tuple[Call | Wait, ...]

    def __str__(self) -> str:
        site = f" at {self.calls[0].site}" if self.calls[0].site else ""
        return f"{' + '.join(map(_text, self.calls))}{site} ({self.moment})"


def _text(event: Call | Wait) -> str:
    if isinstance(event, Call):
        return str(event)
    return f"the wait for its {'last call' if event.back == 1 else f'call {event.back} back'} on {event.group}"


def everything_done(job: Job, log: int) -> Iterator[Done]:
    """What `CodedJob.structures` numbers, in full: all that a log does, without reads."""
    position = 0
    for moment, events, _ in job.logs[log].spans:
        units = dict(units_of(events))
        for i, event in enumerate(events):
            if i in units:
                yield Done(position + i, moment, units[i])
            elif isinstance(event, Wait) or (isinstance(event, Call) and not is_message(event)):
                yield Done(position + i, moment, (event,))
        position += len(events)


def things_done(job: Job, log: int, group: str, peer: int | None = None) -> list[Done]:
    """What a log does on a group, in order: its collectives, or with `peer` its units with that place."""
    found: list[Done] = []
    position = 0
    for moment, events, _ in job.logs[log].spans:
        if peer is None:
            found += (
                Done(position + i, moment, (event,))
                for i, event in enumerate(events)
                if isinstance(event, Call) and event.group == group and not is_message(event)
            )
        else:
            found += (
                Done(position + i, moment, calls)
                for i, calls in units_of(events)
                if calls[0].group == group and calls[0].peer == peer
            )
        position += len(events)
    return found
