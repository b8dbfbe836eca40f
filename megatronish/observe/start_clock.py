"""Where the time from the start of a process to its first step goes.

Counted from when the system started the process, so that imports are in it."""

from __future__ import annotations

import os
import re
import time
from typing import NamedTuple

from megatronish.observe.post_mortem import state_of_process

START_UP = "start-up took "
"""Begins the line of a rank's log."""
_LOADED = time.perf_counter()
_PHASE = re.compile(r"([a-z ]+) ([\d.]+) \(([\d.]+)\)")


class Spent(NamedTuple):
    """Seconds of a phase: on the wall, and of processors."""

    wall: float
    cpu: float


class StartClock:
    """Phases follow each other without gaps."""

    def __init__(self) -> None:
        self._last = Spent(0.0, 0.0)
        self.phases: dict[str, Spent] = {}

    def end(self, phase: str) -> None:
        """What has passed since the phase before ended, or since the process began, was this."""
        now = Spent(_age_of_process(), time.process_time())
        self.phases[phase] = Spent(now.wall - self._last.wall, now.cpu - self._last.cpu)
        self._last = now

    def describe(self) -> str:
        """E.g. `9.21 s (5.02 of CPU): import 4.30 (3.91), rendezvous 1.52 (0.10)`."""
        phases = ", ".join(f"{name} {spent.wall:.2f} ({spent.cpu:.2f})" for name, spent in self.phases.items())
        return f"{self._last.wall:.2f} s ({self._last.cpu:.2f} of CPU): {phases}"


def read_phases(description: str) -> dict[str, Spent]:
    """The phases of `StartClock.describe`."""
    found = _PHASE.findall(description.partition(": ")[2])
    return {name.strip(): Spent(float(wall), float(cpu)) for name, wall, cpu in found}


def _age_of_process() -> float:
    ticks = state_of_process(os.getpid())[1]
    if not ticks:  # no /proc: since this was imported
        return time.perf_counter() - _LOADED
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
