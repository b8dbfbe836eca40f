"""What the ranks of a job left in RUN/post_mortem/ (`observe/post_mortem.py` writes it), read and aligned."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from megatronish.comm.history import Call, Channel, Entry, Event, Moment, Read, Wait, channel_of, place_waited_for
from megatronish.errors import UserError
from megatronish.observe.post_mortem import FOLDER, dump_path, process_path, stacks_path, state_of_process
from megatronish.parallel.mesh import MeshShape
from megatronish.rank_failure import lost_peer

EVENTS: dict[str, type[Call] | type[Wait] | type[Read]] = {"Call": Call, "Wait": Wait, "Read": Read}
HOW_TO_ASK = (
    "kill -USR2 of `megatronish train` or of its ranks, or `scancel --signal=USR2 JOB`, makes them write; so does every rank that "
    "communicates nothing for observe.hang_seconds"
)
ProcessState = Literal["running", "stopped", "gone", "elsewhere"]


class Dump:
    """What one rank wrote."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.rank: int = values["rank"]
        self.world_size: int = values["world_size"]
        self.shape = MeshShape(**values["shape"])
        self.launch: str = values["launch"]
        self.time: float = values["time"]
        self.reason: str = values["reason"]
        self.error: str | None = values["error"]
        self.hang_seconds: float = values["hang_seconds"]
        self.idle_seconds: float = values["idle_seconds"]
        """Since its last event."""
        self.moment = Moment(*values["moment"])
        self.groups: dict[str, tuple[int, ...]] = {name: tuple(ranks) for name, ranks in values["groups"].items()}
        self.counts = {Channel(*channel): count for *channel, count in values["counts"]}
        """Calls on each channel since the start."""
        self.waiting: int | None = values["waiting"]
        """Place in `entries` of the wait or read that it is in."""
        self.stacks: list[dict[str, Any]] = values["stacks"]
        moments = [Moment(*row) for row in values["moments"]]
        events: list[Event] = [EVENTS[kind](*fields) for kind, *fields in values["events"]]
        self.entries = [Entry(-ago, moments[moment], events[event]) for ago, moment, event, _ in values["entries"]]
        """The last events; seconds before the dump, negative."""
        self.numbers: list[int] = [number for *_, number in values["entries"]]
        """Of each call on its channel; -1 for others."""

    @cached_property
    def lost_peer(self) -> str | None:
        """What its error says of a lost peer; None if it ended of itself, or not."""
        return lost_peer(RuntimeError(self.error)) if self.error else None

    @cached_property
    def main_frames(self) -> list[str]:
        """Where the main thread is, outermost first."""
        return list(self.stacks[0]["frames"]) if self.stacks else []

    @property
    def at(self) -> str:
        """The innermost frame of ours."""
        ours = [frame for frame in self.main_frames if frame.startswith("megatronish/") and "/comm/" not in frame]
        return (ours or self.main_frames or ["an unknown place"])[-1]

    @cached_property
    def longest_pause(self) -> float:
        """Between two of its last 200 events."""
        times = [entry.seconds for entry in self.entries[-200:]]
        return max((after - before for before, after in itertools.pairwise(times)), default=0.0)

    @cached_property
    def blocked_in(self) -> int | None:
        """Place of the call that it cannot get past; None if it is in none, or in a read of the device."""
        if self.waiting is not None:
            if not isinstance(self.entries[self.waiting].event, Wait):
                return None
            return place_waited_for([entry.event for entry in self.entries], self.waiting)
        # A call can block as it is made: a communicator is opened, NCCL builds one at its first call.
        last = len(self.entries) - 1
        in_comm = any(frame.startswith("megatronish/comm/") for frame in self.main_frames)
        return last if in_comm and last >= 0 and isinstance(self.entries[last].event, Call) else None

    @property
    def in_read(self) -> bool:
        """The host waits for the device."""
        return self.waiting is not None and isinstance(self.entries[self.waiting].event, Read)

    def calls(self) -> list[tuple[Moment, Call, int]]:
        """The last calls, each with its number on its channel."""
        return [
            (entry.moment, entry.event, number)
            for entry, number in zip(self.entries, self.numbers, strict=True)
            if isinstance(entry.event, Call)
        ]

    def call_at(self, place: int) -> Call:
        """The call at a place of `entries`."""
        event = self.entries[place].event
        assert isinstance(event, Call)
        return event

    def has_made(self, channel: Channel, number: int) -> bool:
        """Whether it has come to this call."""
        return self.counts.get(channel, 0) > number

    def describe(self, place: int) -> str:
        """E.g. `all_reduce (sum) of 2 x float64 on world, loss and gradient norm at FILE:LINE ... (train step 4)`."""
        entry = self.entries[place]
        return f"{entry.event} at {getattr(entry.event, 'site', '')} ({entry.moment})"


@dataclass(frozen=True)
class Evidence:
    """All that is known of a job."""

    run: Path
    launch: str
    shape: MeshShape
    dumps: dict[int, Dump]
    """By rank; some may have none."""
    processes: dict[int, dict[str, Any]]
    """By rank: host, pid and when it started."""

    @property
    def absent(self) -> list[int]:
        """Ranks that wrote nothing."""
        return [rank for rank in range(self.shape.num_ranks) if rank not in self.dumps]

    def name(self, rank: int) -> str:
        return f"rank {rank} [{self.shape.describe(rank)}]"

    def state_of(self, rank: int) -> ProcessState:
        """Of its process, now, if it runs or ran on this host."""
        process = self.processes.get(rank)
        if process is None or process["host"] != socket.gethostname() or not Path("/proc/self/stat").exists():
            return "elsewhere"
        state, started = state_of_process(process["pid"])
        if started != process["started"] or state in ("", "Z", "X"):
            return "gone"
        return "stopped" if state in ("T", "t") else "running"

    def where(self, rank: int) -> str:
        """E.g. `process 4711 on node5`."""
        process = self.processes.get(rank)
        return "" if process is None else f"process {process['pid']} on {process['host']}"

    def stacks_of_c_code(self, rank: int) -> list[str]:
        """What faulthandler wrote of a rank: what happened, and the main thread, innermost frame first."""
        try:
            lines = stacks_path(self.run, rank).read_text(errors="replace").splitlines()
        except OSError:
            return []
        threads = [place for place, line in enumerate(lines) if "(most recent call first)" in line]
        frames = lines[threads[-1] + 1 :] if threads else []  # the main thread is the last
        return lines[:1] + [line.strip() for line in frames if line.startswith("  File")]


class NoDumps(UserError):
    """No rank has written anything, or those that did have gone on and taken it back."""


def collect(run: Path) -> Evidence:
    """The dumps of the newest launch that left any. NoDumps without any, and another UserError where one cannot be read."""
    if not run.is_dir():
        raise UserError(f"{run}: there is no such folder; give a run's, such as runs/demo_cpu")
    found = (_read(path) for path in sorted((run / FOLDER).glob("rank-?????.json")))
    dumps = [dump for dump in found if dump is not None]
    if not dumps:
        raise NoDumps(f"{run / FOLDER} holds no dumps: {HOW_TO_ASK}")
    newest = max(dumps, key=lambda dump: dump.time)
    launch = newest.launch
    processes = {}
    for rank in range(newest.shape.num_ranks):
        for path in (process_path(run, rank), dump_path(run, rank)):
            values = _load(path)
            if values is not None and values.get("launch") == launch:
                processes[rank] = values
    return Evidence(run, launch, newest.shape, {dump.rank: dump for dump in dumps if dump.launch == launch}, processes)


def _read(path: Path) -> Dump | None:
    values = _load(path)
    try:
        return None if values is None else Dump(values)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not a dump of this version of megatronish ({why}): remove it") from error


def _load(path: Path) -> dict[str, Any] | None:
    """None: it is not there. A rank that was only slow takes its dump back, at any moment."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} cannot be read: it holds no object; remove it")
    return values


def channel_at(dump: Dump, place: int) -> tuple[Channel, int]:
    """The channel of the call at a place, and its number there."""
    return channel_of(dump.call_at(place)), dump.numbers[place]


def mirrored(channel: Channel, own_place: int) -> Channel:
    """What the other end of a message calls its channel."""
    return Channel(channel.group, own_place, "receive" if channel.operation == "send" else "send")


def short_stack(frames: Sequence[str], *, most: int = 6) -> list[str]:
    """The innermost frames."""
    return list(frames[-most:])
