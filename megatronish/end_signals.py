"""SIGUSR1 and SIGTERM ask a run to finish its step, save and end with exit code 75.

They are blocked, and a thread takes them: a handler would not run while the main thread waits inside C++. Heard from before torch
is imported, which takes seconds here and minutes on a busy file system. A launcher passes them on to its ranks instead."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

REQUESTS = {signal.SIGUSR1, signal.SIGTERM}
STACKS_SECONDS = 10.0
"""A process that has been asked to end and has not by then leaves where it is. Slurm kills it after KillWait, 30 s if not set."""


class EndSignals:
    """What this process has been asked."""

    def __init__(self) -> None:
        self._told = threading.Event()
        self._has_failed: Callable[[], bool] | None = None
        self._passes_on = False

    def listen(self) -> None:
        """In the main thread, before any other is started: threads inherit what is blocked."""
        signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
        # A signal that is ignored, as scripts start ranks, may be dropped although it is blocked.
        signal.signal(signal.SIGUSR1, lambda *_: None)
        threading.Thread(target=self._take, name="end signals", daemon=True).start()

    def told(self) -> bool:
        """Whether the run should end."""
        return self._told.is_set()

    def wait(self, seconds: float) -> None:
        """Sleep, but not once the run should end."""
        self._told.wait(seconds)

    def begin(self, has_failed: Callable[[], bool]) -> None:
        """From now on there is something to save: SIGTERM is a request too. Once it came and `has_failed` says that a rank of the
        job gave up, nothing can be agreed any more, and the process ends."""
        self._has_failed = has_failed

    def pass_on(self) -> None:
        """In a launcher: send on to the processes started from here, again and again, for those that start just now."""
        self._passes_on = True

    def _take(self) -> None:
        ended, since, has_left_stacks = False, 0.0, False
        while True:
            taken = signal.sigtimedwait(REQUESTS, 1.0)
            number = None if taken is None else taken.si_signo
            if number is not None:
                self._told.set()
            if number == signal.SIGTERM and not ended:
                ended, since = True, time.monotonic()
            if self._passes_on:
                if self._told.is_set():
                    send_to_children(signal.SIGTERM if ended else signal.SIGUSR1)
            elif ended and (self._has_failed is None or self._has_failed()):
                if self._has_failed is not None and not has_left_stacks:
                    _leave_stacks()
                time.sleep(0.2)  # what was written last should come out
                os._exit(128 + signal.SIGTERM)
            elif ended and not has_left_stacks and time.monotonic() > since + STACKS_SECONDS:
                _leave_stacks()
                has_left_stacks = True


def _leave_stacks() -> None:
    """Let observe/post_mortem.py, which listens from before `begin`, write where the threads of this process are."""
    os.kill(os.getpid(), signal.SIGUSR2)


def send_to_children(number: int) -> None:
    """To every process that this one has started."""
    for pid in children_of(os.getpid()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def children_of(pid: int) -> list[int]:
    """Processes that `pid` has started; none where there is no /proc."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if int(file.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(file.parent.name))
    return found
