"""Run the programs of all classes under one rule for what can happen when, to the end or until nobody can go on.

The rules have no races (see `quotient.py`), so a work list decides: each class runs until it blocks, and is looked at again when
what it waits for is done. The time is linear in the number of calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatronish.preflight.programs import Program, Runs
from megatronish.preflight.quotient import Quotient

COLLECTIVE, SEND, RECEIVE, BATCH = range(4)


class Place(NamedTuple):
    """A rank, in a call on one of its groups."""

    rank: int
    slot: int
    """-1: it has ended."""
    op: int = 0
    """Which op of its log that call is."""


class _World:
    """Streams: each class's side of each of its groups has a number."""

    def __init__(self, quotient: Quotient, groups: Sequence[tuple[str, ...]]) -> None:
        """groups: of each class."""
        self.quotient = quotient
        self.groups = groups
        self.first_stream: list[int] = []
        self.owner: list[int] = []
        for number, mine in enumerate(groups):
            self.first_stream.append(len(self.owner))
            self.owner += [number] * len(mine)
        self.members: list[tuple[int, ...]] = []
        """By stream: the streams of all members of its group, shared by them."""
        self.instance: list[int] = []
        known: dict[tuple[str, tuple[int, ...]], int] = {}
        shared: list[tuple[int, ...]] = []
        for number, mine in enumerate(groups):
            for group in mine:
                key = (group, quotient.fellows[number][group])
                if key not in known:
                    known[key] = len(shared)
                    # Who does no collective and has no message there has no stream.
                    shared.append(tuple(self.stream(other, group) for other in key[1] if group in groups[other]))
                self.instance.append(known[key])
                self.members.append(shared[known[key]])
        self.num_instances = len(shared)
        self.ops = quotient.coded.ops.items
        self.forms = [
            COLLECTIVE if op.kind != "unit" else BATCH if op.is_batch else SEND if op.messages[0][0] else RECEIVE for op in self.ops
        ]
        self.position = [0] * len(groups)
        self.ready = deque(range(len(groups)))
        self._partners: list[dict[int, int]] = [{} for _ in self.owner]

    def stream(self, number: int, group: str) -> int:
        """The stream of a class's group."""
        return self.first_stream[number] + self.groups[number].index(group)

    def partner(self, stream: int, op: int) -> int:
        """The stream at the other end of a unit of messages."""
        known = self._partners[stream].get(op)
        if known is None:
            group, peer = self.ops[op].group, self.ops[op].peer
            known = self._partners[stream][op] = self.stream(self.quotient.partner(self.owner[stream], group, peer), group)
        return known

    def meet(self, stream: int, op: int, other: int, theirs: int) -> bool:
        """Whether two units of messages are each other's counterparts; that they match has been seen to."""
        form, its = self.forms[op], self.forms[theirs]
        fits = form == its if form == BATCH else form + its == SEND + RECEIVE and COLLECTIVE not in (form, its)
        return fits and self.partner(other, theirs) == stream

    def awaited(self, place: Place, op: int) -> Iterator[tuple[int, int]]:
        """The ranks that take part in an op with a rank, each with its stream."""
        group = self.groups[self.quotient.class_of[place.rank]][place.slot]
        ranks = self.quotient.job.groups[place.rank][group]
        others = ranks if self.forms[op] == COLLECTIVE else (ranks[self.ops[op].peer],)
        return ((rank, self.stream(self.quotient.class_of[rank], group)) for rank in others)


class OneAtATime(_World):
    """Every collective and every unit of messages is done before its ranks go on. Collectives in a row are done at one stroke."""

    def __init__(self, quotient: Quotient, programs: Sequence[Runs]) -> None:
        super().__init__(quotient, [program.groups for program in programs])
        self.programs = programs
        self._left = [0] * len(programs)
        """By class: how much of the run is left."""
        self._here = [0] * self.num_instances
        self._waiting: list[int] = [-1] * len(self.owner)
        """By stream: the op that its owner is in."""

    def run(self) -> bool:
        """Whether all programs end."""
        while self.ready:
            number = self.ready.popleft()
            runs, position = self.programs[number].runs, self.position[number]
            if position == len(runs):
                continue
            slot, self._left[number], op, _ = runs[position]
            stream = self.first_stream[number] + slot
            self._waiting[stream] = op
            if self.forms[op] == COLLECTIVE:
                self._here[self.instance[stream]] += 1
                self._collect(stream)
                continue
            other = self.partner(stream, op)
            theirs = self._waiting[other]
            if theirs >= 0 and self.meet(stream, op, other, theirs):
                self._leave(stream)
                self._leave(other)
        return all(position == len(program.runs) for position, program in zip(self.position, self.programs, strict=True))

    def _collect(self, stream: int) -> None:
        instance, members = self.instance[stream], self.members[stream]
        if self._here[instance] < len(members):
            return
        count = min(self._left[self.owner[member]] for member in members)
        for member in members:
            self._left[self.owner[member]] -= count
            if not self._left[self.owner[member]]:
                self._here[instance] -= 1
                self._leave(member)

    def _leave(self, stream: int) -> None:
        number = self.owner[stream]
        self._waiting[stream] = -1
        self.position[number] += 1
        self.ready.append(number)

    def reached(self) -> list[int]:
        """By class: how many ops of its log it has come to; all before are done."""
        return [self._place(number) for number in range(len(self.programs))]

    def _place(self, number: int) -> int:
        program, position = self.programs[number], self.position[number]
        if position == len(program.runs):
            return program.places[-1] + 1 if program.places else 0
        return program.places[program.starts[position] + program.runs[position].length - self._left[number]]

    def where(self, rank: int) -> Place:
        """The call that a rank is in."""
        number = self.quotient.class_of[rank]
        program, position = self.programs[number], self.position[number]
        return Place(rank, -1) if position == len(program.runs) else Place(rank, program.runs[position].slot, self._place(number))

    def waits_for(self, place: Place) -> Iterator[Place]:
        """Who has not come to it, and where they are."""
        if place.slot < 0:
            return
        number = self.quotient.class_of[place.rank]
        op = self.programs[number].runs[self.position[number]].op
        for rank, stream in self.awaited(place, op):
            if self.forms[op] != COLLECTIVE or self._waiting[stream] < 0 or self.forms[self._waiting[stream]] != COLLECTIVE:
                yield self.where(rank)


class _Asynchronous(_World):
    """Calls start units and go on; a wait blocks."""

    def __init__(self, quotient: Quotient, programs: Sequence[Program]) -> None:
        super().__init__(quotient, [program.groups for program in programs])
        self.programs = programs
        self.units = [units for program in programs for units in program.units]
        """By stream: the op of each unit."""

    def run(self) -> bool:
        """Whether all programs end."""
        while self.ready:
            self._advance(self.ready.popleft())
        return all(position == len(program.steps) for position, program in zip(self.position, self.programs, strict=True))

    def _advance(self, number: int) -> None:
        """Go on with a class until it is blocked, or ends."""
        raise NotImplementedError


class Streams(_Asynchronous):
    """NCCL: a group is one in-order stream; a unit starts when it is first in its stream, and is done when all have started."""

    def __init__(self, quotient: Quotient, programs: Sequence[Program]) -> None:
        super().__init__(quotient, programs)
        self.posted = [0] * len(self.owner)
        self.done = [0] * len(self.owner)
        self._here = [0] * self.num_instances
        """By instance: members whose stream has a collective first."""
        self._starting: list[int] = []
        self._blocked: list[int] = [-1] * len(self.owner)
        """By stream: the unit that its owner is blocked on."""

    def _advance(self, number: int) -> None:
        steps, base, position = self.programs[number].steps, self.first_stream[number], self.position[number]
        posted, done = self.posted, self.done
        while position < len(steps):
            blocks, slot, unit, _ = steps[position]
            stream = base + slot
            if blocks:
                if done[stream] <= unit:
                    self._blocked[stream] = unit
                    break
            else:
                posted[stream] = unit + 1
                if done[stream] == unit:
                    self._starting.append(stream)
                    self._start()
            position += 1
        self.position[number] = position

    def _start(self) -> None:
        """The first units of these streams have started: complete what that completes."""
        starting = self._starting
        while starting:
            stream = starting.pop()
            op = self.units[stream][self.done[stream]]
            if self.forms[op] == COLLECTIVE:
                instance, members = self.instance[stream], self.members[stream]
                self._here[instance] += 1
                if self._here[instance] == len(members):
                    self._here[instance] = 0
                    for member in members:
                        self._complete(member)
                continue
            other = self.partner(stream, op)
            if self.done[other] < self.posted[other] and self.meet(stream, op, other, self.units[other][self.done[other]]):
                self._complete(stream)
                self._complete(other)

    def _complete(self, stream: int) -> None:
        done = self.done[stream] = self.done[stream] + 1
        if 0 <= self._blocked[stream] < done:
            self._blocked[stream] = -1
            self.ready.append(self.owner[stream])
        if self.posted[stream] > done:
            self._starting.append(stream)

    def where(self, rank: int) -> Place:
        """What a rank is blocked in: the first unit of the stream that it waits for."""
        number = self.quotient.class_of[rank]
        program, position = self.programs[number], self.position[number]
        return Place(rank, -1) if position == len(program.steps) else self._first(rank, program.steps[position].slot)

    def _first(self, rank: int, slot: int) -> Place:
        number = self.quotient.class_of[rank]
        return Place(rank, slot, self.programs[number].places[slot][self.done[self.first_stream[number] + slot]])

    def waits_for(self, place: Place) -> Iterator[Place]:
        """Who has not come to it, and where they are."""
        if place.slot < 0:
            return
        stream = self.first_stream[self.quotient.class_of[place.rank]] + place.slot
        op = self.units[stream][self.done[stream]]
        for rank, theirs in self.awaited(place, op):
            if self.posted[theirs] == self.done[theirs]:
                yield self.where(rank)
            elif self.forms[op] != COLLECTIVE or self.forms[self.units[theirs][self.done[theirs]]] != COLLECTIVE:
                yield self._first(rank, theirs - self.first_stream[self.quotient.class_of[rank]])


class Posted(_Asynchronous):
    """Gloo: calls are posted and do not block. A collective is done when all members have posted it, a message when both ends have;
    messages pair up by partner and tag."""

    def __init__(self, quotient: Quotient, programs: Sequence[Program]) -> None:
        super().__init__(quotient, programs)
        self.collectives = [0] * len(self.owner)
        """By stream: collectives posted."""
        self._done = [0] * self.num_instances
        self._here = [0] * self.num_instances
        self._messages: dict[tuple[int, int, int], int] = {}
        """(from, to, tag), or (to, from, -1 - tag) for receives -> posted."""
        self._calls: list[list[tuple[int, int, int, int]]] = [[] for _ in self.units]
        """By stream, of each call: (instance, -1, 0, number of the collective), or the key of the counterpart and its number."""
        self._sleeping: dict[tuple[int, int, int], list[int]] = {}

    def _advance(self, number: int) -> None:
        steps, base, position = self.programs[number].steps, self.first_stream[number], self.position[number]
        while position < len(steps):
            blocks, slot, unit, call = steps[position]
            stream = base + slot
            if not blocks:
                self._post(stream, self.units[stream][unit])
            else:
                *key, count = self._calls[stream][call]
                if not self._is_done(key[0], key[1], key[2], count):
                    self._sleeping.setdefault((key[0], key[1], key[2]), []).append(number)
                    break
            position += 1
        self.position[number] = position

    def _is_done(self, a: int, b: int, tag: int, count: int) -> bool:
        return (self._done[a] if b < 0 else self._messages.get((a, b, tag), 0)) > count

    def _wake(self, key: tuple[int, int, int]) -> None:
        self.ready.extend(self._sleeping.pop(key, ()))

    def _post(self, stream: int, op: int) -> None:
        if self.forms[op] != COLLECTIVE:
            other = self.partner(stream, op)
            for is_send, tag in self.ops[op].messages:
                mine = (stream, other, tag) if is_send else (stream, other, -1 - tag)
                count = self._messages.get(mine, 0)
                self._messages[mine] = count + 1
                self._calls[stream].append((other, stream, -1 - tag if is_send else tag, count))
                self._wake(mine)
            return
        instance, members = self.instance[stream], self.members[stream]
        count = self.collectives[stream]
        self.collectives[stream] = count + 1
        self._calls[stream].append((instance, -1, 0, count))
        if count == self._done[instance]:
            self._here[instance] += 1
            while self._here[instance] == len(members):
                done = self._done[instance] = self._done[instance] + 1
                self._here[instance] = sum(self.collectives[member] > done for member in members)
                self._wake((instance, -1, 0))

    def where(self, rank: int) -> Place:
        """The call that a rank waits for."""
        number = self.quotient.class_of[rank]
        program, position = self.programs[number], self.position[number]
        if position == len(program.steps):
            return Place(rank, -1)
        _, slot, unit, _ = program.steps[position]
        return Place(rank, slot, program.places[slot][unit])

    def waits_for(self, place: Place) -> Iterator[Place]:
        """Who has not posted it."""
        if place.slot < 0:
            return
        number = self.quotient.class_of[place.rank]
        units, unit = self.programs[number].units[place.slot], self.programs[number].steps[self.position[number]].unit
        count = sum(self.forms[earlier] == COLLECTIVE for earlier in units[:unit])
        is_message = self.forms[units[unit]] != COLLECTIVE
        yield from (
            self.where(rank) for rank, stream in self.awaited(place, units[unit]) if is_message or self.collectives[stream] <= count
        )
