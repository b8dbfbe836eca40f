"""What this process communicates, as it happens: the last few thousand events in training, all of them in a rehearsal.

Every function of `comm/` that talks to torch.distributed, or makes the host wait, says so here first. Groups are named by their
axis and peers by their place in the group, never by rank: ranks that differ in their coordinates alone have equal histories.

One process has one history, as it has one set of process groups: `current()`. A rehearsal puts its own there.
"""

from __future__ import annotations

import bisect
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import NamedTuple, Protocol

import torch

RING_EVENTS = 4096
"""What a training process keeps: a few steps of a small layout, the last microbatches of a deep pipeline."""

_HERE = os.path.dirname(os.path.abspath(__file__))
_TORCH = os.path.dirname(torch.__file__) + os.sep
_ROOT = os.path.dirname(os.path.dirname(_HERE)) + os.sep


class Call(NamedTuple):
    """One call to a communicator, or one message of an exchange."""

    operation: str
    """open, all_reduce, all_gather, reduce_scatter, barrier, send or receive."""
    group: str
    """The mesh axis, `world`, or `ends`."""
    num_elements: int = 0
    """Of this rank's input; of the output for a receive."""
    dtype: str = ""
    reduce_op: str = ""
    peer: int | None = None
    """Place in the group, for send and receive."""
    tag: int = 0
    batch: int = 0
    """Messages of one exchange share this number, counted from 1 on their group; 0: not part of one."""
    what: str = ""
    """What it is for: a module's global name, `gradient norm`, ..."""
    site: str = ""
    """file:line function that asked for it, outside comm/."""

    def __str__(self) -> str:
        size = f" of {self.num_elements:,} x {self.dtype}" if self.dtype else ""
        reduce = f" ({self.reduce_op})" if self.reduce_op else ""
        peer = "" if self.peer is None else f" {'to' if self.operation == 'send' else 'from'} place {self.peer}"
        return f"{self.operation}{reduce}{size} on {self.group}{peer}" + (f", {self.what}" if self.what else "")


class Wait(NamedTuple):
    """What follows waits for an earlier call: on GPU the device's stream, on CPU the host."""

    group: str
    back: int
    """Which call of the group: 1 is the latest before this event."""
    site: str = ""


class Read(NamedTuple):
    """The host waits until the device has done all it was given."""

    what: str
    site: str = ""


Event = Call | Wait | Read


class Moment(NamedTuple):
    """Where in the run an event happened."""

    phase: str = "start"
    """start, build, resume, dry batch, train, evaluate, save, ..."""
    step: int = 0
    action: str = ""
    """Of the pipeline's schedule, e.g. F3 or B0.1; empty outside it."""

    def __str__(self) -> str:
        return " ".join(part for part in (self.phase, f"step {self.step}" if self.step else "", self.action) if part)


class Entry(NamedTuple):
    """An event, when it began."""

    seconds: float
    """time.monotonic()"""
    moment: Moment
    event: Event


class Channel(NamedTuple):
    """Calls that are counted together: number n on a channel is one thing on all ranks that are in it, whatever else they do."""

    group: str
    peer: int | None = None
    """None: the collectives of the group."""
    operation: str = ""
    """send or receive; empty for collectives."""


def channel_of(call: Call) -> Channel:
    """Which channel a call is on."""
    return Channel(call.group) if call.peer is None else Channel(call.group, call.peer, call.operation)


class History:
    """The events of one process, in order."""

    def __init__(self, *, most: int | None = RING_EVENTS, names_sites: bool = True) -> None:
        """most: how many events are kept, all if None."""
        self.entries: deque[Entry] = deque(maxlen=most)
        self.groups: dict[str, tuple[int, ...]] = {}
        """Global ranks of each group, in the order of places."""
        self.num_calls: dict[str, int] = {}
        """By group, from the start, kept or not."""
        self.num_announced: dict[str, int] = {}
        """By group: those that this process has made or is about to make, communicators apart."""
        self.last_on: dict[Channel, tuple[int, Entry]] = {}
        """The latest call on each channel, and its number there, from 0: by them the last events of several ranks are aligned."""
        self.moment = Moment()
        self.waiting: Entry | None = None
        """The wait or host read that this process is in now."""
        self._num_batches: dict[str, int] = {}
        self._sites: dict[tuple[CodeType, int], str] = {}
        self._names_sites = names_sites

    def open(self, group: str, ranks: tuple[int, ...]) -> None:
        """A communicator is about to be made."""
        self.groups[group] = ranks
        self.call(Call("open", group, len(ranks)))
        self.num_announced[group] -= 1

    def call(self, call: Call) -> int:
        """A call is about to be made; its number on the group, from 0."""
        number = self.num_calls.get(call.group, 0)
        self.num_calls[call.group] = number + 1
        self.num_announced[call.group] = self.num_announced.get(call.group, 0) + 1
        entry = self._add(call._replace(site=self._site()))
        channel = channel_of(call)
        last = self.last_on.get(channel)
        self.last_on[channel] = (0 if last is None else last[0] + 1, entry)
        return number

    def next_batch(self, group: str) -> int:
        """A number for the messages of the next exchange."""
        self._num_batches[group] = number = self._num_batches.get(group, 0) + 1
        return number

    def begin_wait(self, group: str, number: int) -> None:
        """What follows waits for call `number` of the group; `end_wait` when the host goes on."""
        self.waiting = self._add(Wait(group, self.num_calls[group] - number, self._site()))

    def begin_read(self, what: str) -> None:
        """The host waits for the device; `end_wait` when it goes on."""
        self.waiting = self._add(Read(what, self._site()))

    def end_wait(self) -> None:
        """The host goes on."""
        self.waiting = None

    def numbered(self) -> list[tuple[Entry, int]]:
        """The events that are kept, each call with its number on its channel (-1: not a call). From any thread, at any moment."""
        # In this order: what is added meanwhile comes after the latest of `last_on`, and counts on from there.
        last_on = dict(self.last_on)
        entries = self._copied()
        places = {id(entry): place for place, entry in enumerate(entries)}
        numbers = [-1] * len(entries)
        calls: dict[Channel, list[int]] = {}
        for place, entry in enumerate(entries):
            if isinstance(entry.event, Call):
                calls.setdefault(channel_of(entry.event), []).append(place)
        for channel, on_it in calls.items():
            number, last = last_on.get(channel, (-1, None))
            place = places.get(id(last), -1)  # -1: so many came meanwhile that it is not kept any more, or it is the first
            first = number - bisect.bisect_right(on_it, place) + 1
            for offset, at in enumerate(on_it):
                numbers[at] = first + offset
        return list(zip(entries, numbers, strict=True))

    def _copied(self) -> list[Entry]:
        while True:
            try:
                return list(self.entries)
            except RuntimeError:  # it grew meanwhile
                continue

    def _add(self, event: Event) -> Entry:
        entry = Entry(time.monotonic(), self.moment, event)
        self.entries.append(entry)
        return entry

    def _site(self) -> str:
        if not self._names_sites:
            return ""
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_code.co_filename.startswith((_HERE, _TORCH)):
            frame = frame.f_back
        key = (frame.f_code, frame.f_lineno)
        if key not in self._sites:
            file = frame.f_code.co_filename.removeprefix(_ROOT)
            self._sites[key] = f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
        return self._sites[key]


def place_waited_for(events: Sequence[Event], place: int) -> int | None:
    """Where the call is that the Wait at `place` waits for; None if it is older than `events`."""
    wait = events[place]
    assert isinstance(wait, Wait)
    left = wait.back
    for at in range(place - 1, -1, -1):
        event = events[at]
        if isinstance(event, Call) and event.group == wait.group:
            left -= 1
            if left == 0:
                return at
    return None


_current = History()


class Waits(Protocol):
    """torch.distributed's Work."""

    def wait(self) -> bool:
        """The result is there for what follows."""


@dataclass(frozen=True, slots=True)
class Started:
    """A call under way."""

    work: Waits
    group: str
    number: int

    def wait(self) -> None:
        """Order its result before what follows: on CPU the host waits, on GPU the stream."""
        history = _current
        history.begin_wait(self.group, self.number)
        self.work.wait()
        history.end_wait()


def current() -> History:
    """This process's history."""
    return _current


@contextmanager
def recording(history: History) -> Iterator[History]:
    """Events go to `history` meanwhile: for a rehearsal, or a test."""
    global _current
    before, _current = _current, history
    try:
        yield history
    finally:
        _current = before


@contextmanager
def phase(name: str, step: int | None = None) -> Iterator[None]:
    """What happens meanwhile belongs to this phase of the run, in this step (None: as before)."""
    before = _current.moment
    _current.moment = Moment(name, before.step if step is None else step)
    try:
        yield
    finally:
        _current.moment = before


def note_action(action: str) -> None:
    """What happens from now on belongs to this action of the pipeline's schedule; empty: to none."""
    _current.moment = _current.moment._replace(action=action)
