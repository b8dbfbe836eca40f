"""What a rank of many does when it fails: one report for the whole job, the right exit code, and no wall of tracebacks.

Collectives no longer work then, so ranks settle who speaks through the job's store. Whoever fails first reports at once; the others
stay silent and wait to be stopped by the launcher. Ranks that only saw a peer vanish say so in one line each, the first three of
them, unless the reason was reported. Where the store cannot be reached (rank 0 served it and is gone), rank 0 reports at once, the
others after a moment, with their rank.
"""

from __future__ import annotations

import datetime
import os
import re
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol

from megatronish import failures
from megatronish.comm import history
from megatronish.errors import BAD_INPUT, FAULT, exit_code_of
from megatronish.parallel.rendezvous import Place, shared_store

LINGER_SECONDS = 5.0
"""How long a rank with nothing new to say waits for the launcher to stop it; torchrun's agent does so in a fraction of a second."""

_LOST_PEER = re.compile(
    r"Connection (was likely )?(closed|reset) by (peer|remote peer)|Connection was likely closed|Broken pipe|Socket (is )?closed"
    r"|ncclRemoteError|remote process exited|communicator was aborted|Connection refused|failed to (recv|send), got",
    re.IGNORECASE,
)
CHECKED = "MEGATRONISH_CHECKED"
"""Set by a batch script that has checked config, data and number of ranks."""
MAX_LOST_PEERS = 3
"""Ranks that say so, where nobody gave the reason: a rank that was killed takes all the others with it."""
_REPORTED, _FAILED, _LOST = "reported", "failed", "lost"


class Board(Protocol):
    """What is needed of the job's store."""

    def add(self, key: str, amount: int) -> int: ...

    def check(self, keys: list[str]) -> bool: ...

    def set(self, key: str, value: str) -> None: ...


def lost_peer(error: BaseException) -> str | None:
    """What `error` says of a lost peer, in one line; None if it is about something else."""
    # Errors of torch's communication, of gloo, NCCL and the store, are RuntimeErrors with nothing but a text.
    match = _LOST_PEER.search(str(error)) if isinstance(error, RuntimeError) else None
    return match and next(line.strip() for line in str(error).splitlines() if match[0] in line)


class RankGuard:
    """Context manager around all that a rank does. `run_folder` is set as soon as it is known. `wait`: sleeps, but not for long
    once the process is asked to end.

    Alone (world size 1) it only adds to the log, and in RUN/failures, and lets the exception pass. As one of many it ends in
    SystemExit, with the code of errors.py, 76 for what has none there; an interrupt ends the process at once,
    since the launcher passes it on to every rank."""

    def __init__(
        self, place: Place, *, linger_seconds: float = LINGER_SECONDS, wait: Callable[[float], object] = time.sleep
    ) -> None:
        self.place = place
        self._wait = wait
        self.run_folder: Path | None = None
        self.has_agreed = False
        """All ranks have found the same config and data: an error from now on is the job's."""
        self._linger_seconds = linger_seconds

    def __enter__(self) -> RankGuard:
        if self.place.world_size > 1 and threading.current_thread() is threading.main_thread():
            # A rank that waits inside a collective would see a KeyboardInterrupt only when that ends, which may be never.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or not isinstance(error, Exception):
            return
        self._write_log(lost_peer(error) or _full_text(error))
        self._leave_reason(error)
        if self.place.world_size > 1:
            raise SystemExit(self._report(error)) from error

    def _code_of(self, error: Exception) -> int | None:
        """See exit_code_of. What was in order when the batch script looked, and is not here, is this node's fault."""
        code = exit_code_of(error)
        return FAULT if code == BAD_INPUT and not self.has_agreed and CHECKED in os.environ else code

    def _report(self, error: Exception) -> int:
        for_user = self._code_of(error)
        code = for_user or FAULT
        who = f"rank {self.place.rank} of {self.place.world_size}"
        board: Board | None = shared_store(self.place, timeout=datetime.timedelta(seconds=2))
        try:
            if board is not None:
                board.add(_FAILED, 1)
            if reason := lost_peer(error):
                if board is None:
                    _print(f"{who} lost a peer: {reason}")
                elif not board.check([_REPORTED]) and (count := board.add(_LOST, 1)) <= MAX_LOST_PEERS:
                    _print(f"{who}{', and maybe others,' if count == MAX_LOST_PEERS else ''} lost a peer: {reason}")
            elif board is not None:
                # Ranks may give different bad input; each such message is said once. Of failures in our code the first tells most.
                topic = f"error {zlib.crc32(str(error).encode()):08x}" if for_user else "failure"
                if board.add(topic, 1) == 1:
                    _print(_error_lines(error) if for_user else f"{who} failed:\n{_full_text(error)}")
                    board.set(_REPORTED, "1")
                    self._serve_others(board)
                    return code
            else:
                if self.place.rank > 0:
                    self._wait(self._linger_seconds)
                _print(_error_lines(error, prefix=f"{who}: ") if for_user else f"{who} failed:\n{_full_text(error)}")
                return code
        except RuntimeError:  # the store went away meanwhile
            _print(f"{who} failed:\n{_full_text(error)}")
        self._wait(self._linger_seconds)
        return code

    def _serve_others(self, board: Board) -> None:
        """Where this rank serves the store: those that fail as well, and at the same time, must still find it."""
        stop = time.monotonic() + self._linger_seconds
        while self.place.rank == 0 and not self.place.agent_serves and time.monotonic() < stop:
            if board.add(_FAILED, 0) >= self.place.world_size:
                self._wait(self._linger_seconds / 10)  # the last has yet to ask who speaks
                return
            self._wait(self._linger_seconds / 50)

    def _leave_reason(self, error: Exception) -> None:
        """For the launcher, and for `megatronish status`."""
        if self.run_folder is None or not self.run_folder.is_dir():
            return
        reason, entries = lost_peer(error), history.current().numbered()
        text = reason or (str(error) if exit_code_of(error) else "".join(traceback.format_exception_only(error)))
        failure = failures.now(
            self.place.rank,
            self.place.world_size,
            self.place.launch,
            # An error has left the phase that it came from.
            where=str(entries[-1][0].moment) if entries else "start",
            error=" ".join(text.split()),
            code=self._code_of(error) or FAULT,
            lost_peer=reason is not None,
        )
        failures.leave(self.run_folder, failure)

    def _write_log(self, text: str) -> None:
        if self.run_folder is None or not (self.run_folder / "logs").is_dir():
            return
        try:
            with open(
                self.run_folder / "logs" / f"rank-{self.place.rank:05d}.log", "a", encoding="utf-8", errors="backslashreplace"
            ) as log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        except OSError:
            pass  # the disk may be what failed; standard error still has the report


def _full_text(error: Exception) -> str:
    """The traceback; of what is meant for the user the message alone."""
    if exit_code_of(error):
        return _error_lines(error)
    return "".join(traceback.format_exception(error)).rstrip()


def _error_lines(error: Exception, *, prefix: str = "") -> str:
    return "\n".join(f"error: {prefix}{line}" for line in str(error).splitlines())


def _print(text: str) -> None:
    # One write: lines of several ranks do not mix.
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
