"""Run the programs of all classes under one rule for what can happen when, to the end or until nobody can go on.

The rules have no races (see `quotient.py`), so a work list decides: each class runs until it blocks, and is looked at again when
what it waits for is done. The time is linear in the number of calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatronish.preflight.quotient import Program, Quotient

COLLECTIVE, SEND, RECEIVE, BATCH = range(4)


class Place(NamedTuple):
    """A rank, in a call on one of its groups."""

    rank: int
    slot: int
    """-1: it has ended."""
    unit: int = 0


class _World:
    """Streams: each class's side of each of its groups has a number."""

    def __init__(self, quotient: Quotient, programs: Sequence[Program]) -> None:
        self.quotient = quotient
        self.programs = programs
        self.first_stream: list[int] = []
        self.units: list[list[int]] = []
        """By stream: the op of each unit."""
        self.owner: list[int] = []
        for number, program in enumerate(programs):
            self.first_stream.append(len(self.units))
            self.units += program.units
            self.owner += [number] * len(program.groups)
        self.members: list[tuple[int, ...]] = []
        """By stream: the streams of all members of its group, shared by them."""
        self.instance: list[int] = []
        known: dict[tuple[str, tuple[int, ...]], int] = {}
        shared: list[tuple[int, ...]] = []
        for number, program in enumerate(programs):
            for group in program.groups:
                key = (group, quotient.fellows[number][group])
                if key not in known:
                    known[key] = len(shared)
                    # Who does no collective and has no message there has no stream.
                    with_it = [other for other in key[1] if group in programs[other].groups]
                    shared.append(tuple(self.stream(other, group) for other in with_it))
                self.instance.append(known[key])
                self.members.append(shared[known[key]])
        self.num_instances = len(shared)
        self.ops = quotient.coded.ops.items
        self.forms = [
            COLLECTIVE if op.kind != "unit" else BATCH if op.is_batch else SEND if op.messages[0][0] else RECEIVE for op in self.ops
        ]
        self._partners: list[dict[int, int]] = [{} for _ in self.units]

    def stream(self, number: int, group: str) -> int:
        """The stream of a class's group."""
        return self.first_stream[number] + self.programs[number].groups.index(group)

    def partner(self, stream: int, op: int) -> int:
        """The stream at the other end of a unit of messages."""
        known = self._partners[stream].get(op)
        if known is None:
            group, peer = self.ops[op].group, self.ops[op].peer
            known = self._partners[stream][op] = self.stream(self.quotient.partner(self.owner[stream], group, peer), group)
        return known

    def group(self, place: Place) -> str:
        return self.programs[self.quotient.class_of[place.rank]].groups[place.slot]

    def at(self, rank: int, group: str) -> int:
        """The stream of a rank's group."""
        return self.stream(self.quotient.class_of[rank], group)


class Streams(_World):
    """NCCL: a group is one in-order stream; a unit starts when it is first in its stream, and is done when all have started."""

    def __init__(self, quotient: Quotient, programs: Sequence[Program], *, one_at_a_time: bool) -> None:
        """one_at_a_time: every unit blocks its rank until it is done."""
        super().__init__(quotient, programs)
        self.one_at_a_time = one_at_a_time
        self.position = [0] * len(programs)
        self.posted = [0] * len(self.units)
        self.done = [0] * len(self.units)
        self._here = [0] * self.num_instances
        """By instance: members whose stream has a collective first."""
        self._starting: list[int] = []
        self._blocked: list[int] = [-1] * len(self.units)
        """By stream: the unit that its owner is blocked on."""
        self._ready = deque(range(len(programs)))

    def run(self) -> bool:
        """Whether all programs end."""
        while self._ready:
            self._advance(self._ready.popleft())
        return all(position == len(program.steps) for position, program in zip(self.position, self.programs, strict=True))

    def _advance(self, number: int) -> None:
        steps, base, position = self.programs[number].steps, self.first_stream[number], self.position[number]
        posted, done, one_at_a_time = self.posted, self.done, self.one_at_a_time
        while position < len(steps):
            blocks, slot, unit, _ = steps[position]
            stream = base + slot
            if not blocks and posted[stream] == unit:
                posted[stream] = unit + 1
                if done[stream] == unit:
                    self._starting.append(stream)
                    self._start()
            if (blocks or one_at_a_time) and done[stream] <= unit:
                self._blocked[stream] = unit
                break
            position += 1
        self.position[number] = position

    def _start(self) -> None:
        """The first units of these streams have started: complete what that completes."""
        starting = self._starting
        while starting:
            stream = starting.pop()
            op = self.units[stream][self.done[stream]]
            form = self.forms[op]
            if form == COLLECTIVE:
                instance, members = self.instance[stream], self.members[stream]
                self._here[instance] += 1
                if self._here[instance] == len(members):
                    self._here[instance] = 0
                    for member in members:
                        self._complete(member)
                continue
            other = self.partner(stream, op)
            if self._meets(other, stream, form):
                self._complete(stream)
                self._complete(other)

    def _meets(self, other: int, stream: int, form: int) -> bool:
        if self.done[other] == self.posted[other]:
            return False
        op = self.units[other][self.done[other]]
        theirs = self.forms[op]
        if theirs == COLLECTIVE or self.partner(other, op) != stream:
            return False
        return form == theirs == BATCH or (form + theirs == SEND + RECEIVE and BATCH not in (form, theirs))

    def _complete(self, stream: int) -> None:
        done = self.done[stream] = self.done[stream] + 1
        if 0 <= self._blocked[stream] < done:
            self._blocked[stream] = -1
            self._ready.append(self.owner[stream])
        if self.posted[stream] > done:
            self._starting.append(stream)

    def where(self, rank: int) -> Place:
        """What a rank is blocked in: the first unit of the stream that it waits for."""
        number = self.quotient.class_of[rank]
        program, position = self.programs[number], self.position[number]
        if position == len(program.steps):
            return Place(rank, -1)
        slot = program.steps[position].slot
        return Place(rank, slot, self.done[self.first_stream[number] + slot])

    def waits_for(self, place: Place) -> Iterator[Place]:
        """Who has not come to it, and where they are."""
        if place.slot < 0:
            return
        group = self.group(place)
        stream = self.at(place.rank, group)
        op = self.units[stream][place.unit]
        ranks = self.quotient.job.groups[place.rank][group]
        form = self.forms[op]
        others = ranks if form == COLLECTIVE else (ranks[self.ops[op].peer],)
        for other in others:
            theirs = self.at(other, group)
            if self.posted[theirs] == self.done[theirs]:
                yield self.where(other)
            elif form != COLLECTIVE or self.forms[self.units[theirs][self.done[theirs]]] != COLLECTIVE:
                yield Place(other, theirs - self.first_stream[self.quotient.class_of[other]], self.done[theirs])


class Posted(_World):
    """Gloo: calls are posted and do not block. A collective is done when all members have posted it, a message when both ends have;
    messages pair up by partner and tag."""

    def __init__(self, quotient: Quotient, programs: Sequence[Program]) -> None:
        super().__init__(quotient, programs)
        self.position = [0] * len(programs)
        self.collectives = [0] * len(self.units)
        """By stream: collectives posted."""
        self._done = [0] * self.num_instances
        self._here = [0] * self.num_instances
        self._messages: dict[tuple[int, int, int], int] = {}
        """(from, to, tag), or (to, from, -1 - tag) for receives -> posted."""
        self._calls: list[list[tuple[int, int, int, int]]] = [[] for _ in self.units]
        """By stream, of each call: (instance, -1, 0, number of the collective), or the key of the counterpart and its number."""
        self._sleeping: dict[tuple[int, int, int], list[int]] = {}
        self._ready = deque(range(len(programs)))

    def run(self) -> bool:
        """Whether all programs end."""
        while self._ready:
            self._advance(self._ready.popleft())
        return all(position == len(program.steps) for position, program in zip(self.position, self.programs, strict=True))

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
        self._ready.extend(self._sleeping.pop(key, ()))

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
        return Place(rank, -1) if position == len(program.steps) else Place(rank, *program.steps[position][1:3])

    def waits_for(self, place: Place) -> Iterator[Place]:
        """Who has not posted it."""
        if place.slot < 0:
            return
        number = self.quotient.class_of[place.rank]
        group = self.group(place)
        stream = self.first_stream[number] + place.slot
        op = self.units[stream][place.unit]
        ranks = self.quotient.job.groups[place.rank][group]
        if self.forms[op] != COLLECTIVE:
            yield self.where(ranks[self.ops[op].peer])
            return
        count = sum(self.forms[earlier] == COLLECTIVE for earlier in self.units[stream][: place.unit])
        yield from (self.where(other) for other in ranks if self.collectives[self.at(other, group)] <= count)
