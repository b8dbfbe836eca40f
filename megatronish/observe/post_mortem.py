"""What a rank leaves for `megatronish why-hung`: RUN/post_mortem/rank-00005.json with its last events, what it waits in, and where
each of its threads is. Written on SIGUSR2, on an exception, and when nothing has happened for `observe.hang_seconds`.

A thread does it, since the main thread may be blocked in C++ for ever: there a signal's Python handler would not run. Where even
that thread cannot run, because C code holds the interpreter's lock, faulthandler's own writes rank-00005.stacks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Literal

from megatronish.comm import history
from megatronish.comm.history import Call, Channel, Entry, Event, Wait, channel_of, place_waited_for
from megatronish.errors import exit_code_of

FOLDER = "post_mortem"
SIGNAL = signal.SIGUSR2
LOCKED_SECONDS = 30.0
"""So long must C code hold the interpreter's lock before faulthandler writes the stacks."""
TICK_SECONDS = 1.0

Reason = Literal["signal", "timeout", "crash"]
_ROOT = str(Path(__file__).resolve().parent.parent.parent) + os.sep


def dump_path(run_dir: Path, rank: int) -> Path:
    """What a rank writes."""
    return run_dir / FOLDER / f"rank-{rank:05d}.json"


def process_path(run_dir: Path, rank: int) -> Path:
    """Which process a rank is: what can be asked about one that wrote nothing."""
    return run_dir / FOLDER / f"rank-{rank:05d}.process.json"


def stacks_path(run_dir: Path, rank: int) -> Path:
    """faulthandler's text: of a crash in C code, or of C code that holds the interpreter's lock."""
    return run_dir / FOLDER / f"rank-{rank:05d}.stacks"


@dataclass(frozen=True)
class Who:
    """A rank of a launch."""

    rank: int
    world_size: int
    shape: Mapping[str, int]
    """Size of each mesh axis."""
    coordinates: str
    """For people, e.g. `pp0 dp1 tp0`."""
    launch: str
    """Tells the launches of a run apart."""

    def process(self) -> dict[str, Any]:
        """The rank, and the process that it is."""
        who = {"rank": self.rank, "world_size": self.world_size, "shape": dict(self.shape), "coordinates": self.coordinates}
        process = {"host": socket.gethostname(), "pid": os.getpid(), "started": state_of_process(os.getpid())[1]}
        return who | process | {"launch": self.launch, "time": time.time()}


def state_of_process(pid: int) -> tuple[str, int]:
    """(Linux's letter for its state, its start in ticks since the machine's own: another process may get its number later).
    ("", 0): there is none, or no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[19])


class PostMortem:
    """Context manager around a rank's run. An exception that is not meant for the user is written down and passes."""

    def __init__(self, run_dir: Path, who: Who, *, hang_seconds: float) -> None:
        """hang_seconds: write when nothing has happened for so long; 0: never."""
        self._run_dir = run_dir
        self._who = who
        self._hang_seconds = hang_seconds
        self._started = time.monotonic()
        self._reported_since: float | None = None
        self._written: Reason | None = None
        self._stacks: IO[str] | None = None
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._watch, name="post mortem", daemon=True)
        self._restore: tuple[Any, int] | None = None
        self._enabled_faulthandler = False

    def __enter__(self) -> PostMortem:
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(SIGNAL, lambda *_: None)  # the byte in the pipe is what matters
            signal.siginterrupt(SIGNAL, False)
            self._restore = before, signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIGNAL})
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._restore is not None:
            handler, descriptor = self._restore
            signal.set_wakeup_fd(descriptor)
            # A late signal must not end a process that is about to end well.
            signal.signal(SIGNAL, signal.SIG_IGN if handler == signal.SIG_DFL else handler)
        with contextlib.suppress(BlockingIOError):  # full of signals: the thread wakes up in any case
            os.write(self._wake_write, b"\0")
        self._thread.join(timeout=10.0)
        if isinstance(error, Exception) and not exit_code_of(error):
            self.write("crash", error=error)
        elif error is None:
            with contextlib.suppress(OSError):  # the last one finds the folder empty, if nobody wrote a dump
                process_path(self._run_dir, self._who.rank).unlink(missing_ok=True)
                (self._run_dir / FOLDER).rmdir()
        if not self._thread.is_alive():
            os.close(self._wake_read)
            os.close(self._wake_write)

    def write(self, reason: Reason, *, error: Exception | None = None) -> Path | None:
        """Write the dump, in place of an earlier one; its path, or None if that fails: the run goes on or ends as it would."""
        path = dump_path(self._run_dir, self._who.rank)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._who.process() | self._state(reason, error), separators=(",", ":")))
            temporary.replace(path)
            self._written = reason
        except OSError as failure:
            sys.stderr.write(f"WARNING: {path}: cannot be written ({failure.strerror})\n")
            return None
        return path

    def _state(self, reason: Reason, error: Exception | None) -> dict[str, Any]:
        record, now = history.current(), time.monotonic()
        numbered, waiting = record.numbered(), record.waiting
        counts: dict[Channel, int] = {channel: number + 1 for channel, (number, _) in dict(record.last_on).items()}
        for entry, number in numbered:
            if isinstance(entry.event, Call):
                counts[channel_of(entry.event)] = number + 1
        stacks = _stacks_of_threads(skip=self._thread)
        if error is not None:
            stacks[0] = {"thread": "MainThread", "frames": [_place(f.filename, f.lineno, f.name) for f in _frames_of(error)]}
        return {
            "format": 1,
            "reason": reason,
            "error": None if error is None else "".join(traceback.format_exception_only(error)).strip(),
            "hang_seconds": self._hang_seconds,
            # An error has left the phase that it came from.
            "moment": list(numbered[-1][0].moment if error is not None and numbered else record.moment),
            "groups": dict(record.groups),
            "counts": [[*channel, count] for channel, count in counts.items()],
            "waiting": next((place for place, (entry, _) in enumerate(numbered) if entry is waiting), None),
            "idle_seconds": now - (numbered[-1][0].seconds if numbered else self._started),
            "stacks": stacks,
            **_packed(numbered, now),
        }

    def _watch(self) -> None:
        tick = min(TICK_SECONDS, self._hang_seconds / 4 or TICK_SECONDS)
        while True:
            readable, _, _ = select.select([self._wake_read], [], [], tick)
            signals = os.read(self._wake_read, 4096) if readable else b""
            if 0 in signals:
                break
            self._announce()
            if self._stacks is not None:  # again and again, before it is due: it is only ever due where this thread cannot run
                faulthandler.dump_traceback_later(LOCKED_SECONDS, file=self._stacks)
            if SIGNAL in signals:
                path = self.write("signal")
                logging.getLogger("megatronish").info("%s: wrote %s", SIGNAL.name, path)
            with contextlib.suppress(OSError):  # a disk that fails for a moment must not end the watch
                self._look()
        if self._stacks is not None:
            faulthandler.cancel_dump_traceback_later()
            if self._enabled_faulthandler:
                faulthandler.disable()
            with contextlib.suppress(OSError):
                if not os.fstat(self._stacks.fileno()).st_size:
                    Path(self._stacks.name).unlink(missing_ok=True)

    def _announce(self) -> None:
        """Once the run's folder is there: who this is, and a file for faulthandler."""
        if self._stacks is not None or not (self._run_dir / "logs").is_dir():
            return
        with contextlib.suppress(OSError):
            path = process_path(self._run_dir, self._who.rank)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(self._who.process()))
            self._stacks = open(stacks_path(self._run_dir, self._who.rank), "w")  # noqa: SIM115 (for as long as the process lives)
            if not faulthandler.is_enabled():
                faulthandler.enable(self._stacks)
                self._enabled_faulthandler = True

    def _look(self) -> None:
        """Write once for each time that nothing happens for so long."""
        entries = history.current().entries
        since = entries[-1].seconds if entries else self._started
        idle = time.monotonic() - since
        if self._written == "timeout" and since != self._reported_since:  # it goes on: it was only slow
            dump_path(self._run_dir, self._who.rank).unlink(missing_ok=True)
            self._written = None
        if not self._hang_seconds or idle < self._hang_seconds or since == self._reported_since:
            return
        self._reported_since = since
        path = self.write("timeout")
        who, run = self._who, self._run_dir
        logging.getLogger("megatronish").warning(
            "rank %d [%s] %s; wrote %s; megatronish why-hung %s says who is missing",
            who.rank,
            who.coordinates,
            _what_it_does(idle),
            path,
            run,
        )


def _what_it_does(idle: float) -> str:
    """E.g. `has been waiting 300 s in all_reduce ... at FILE:LINE`."""
    record = history.current()
    entries, waiting = [entry for entry, _ in record.numbered()], record.waiting
    place = next((place for place, entry in enumerate(entries) if entry is waiting), None)
    if waiting is None or place is None:
        frames = _walk(sys._current_frames().get(threading.main_thread().ident or 0))
        ours = [frame for frame in frames if frame.startswith("megatronish/")] or frames
        where = f", it is at {ours[-1]}" if ours else ""
        return f"has communicated nothing for {idle:.0f} s{where} ({record.moment})"
    event = waiting.event
    call = place_waited_for([entry.event for entry in entries], place) if isinstance(event, Wait) else None
    what = f"a read of {event.what}" if isinstance(event, history.Read) else "a call" if call is None else str(entries[call].event)
    return f"has been waiting {idle:.0f} s in {what} at {event.site} ({record.moment})"


def _packed(numbered: list[tuple[Entry, int]], now: float) -> dict[str, Any]:
    """The ring as tables: a step has few distinct calls and moments."""
    moments: dict[tuple[Any, ...], int] = {}
    events: dict[Event, int] = {}
    rows = []
    for (seconds, moment, event), number in numbered:
        at, what = moments.setdefault(moment, len(moments)), events.setdefault(event, len(events))
        rows.append([round(now - seconds, 4), at, what, number])
    return {"moments": list(moments), "events": [[type(event).__name__, *event] for event in events], "entries": rows}


def _stacks_of_threads(*, skip: threading.Thread) -> list[dict[str, Any]]:
    """Outermost frame first; the main thread's first of all."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: (item[0] != main, item[0]))
    return [{"thread": names.get(ident, "?"), "frames": _walk(frame)} for ident, frame in frames if ident != skip.ident]


def _walk(frame: FrameType | None) -> list[str]:
    found = []
    while frame is not None:
        found.append(_place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return found[::-1]


def _frames_of(error: Exception) -> list[traceback.FrameSummary]:
    return list(traceback.StackSummary.extract(traceback.walk_tb(error.__traceback__), lookup_lines=False))


def _place(file: str, line: int | None, function: str) -> str:
    # No source lines: their file may lie on a disk that hangs too.
    return f"{file.removeprefix(_ROOT)}:{line} {function}"
