"""How far a run is: a live bar on a terminal, plain lines in the log of a batch job."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class TrainingProgress:
    """Context manager around training, on one rank (`enabled`; on the others it does nothing).

    Draws a bar where standard error is a terminal. Elsewhere prints a line for an update, at most one in `plain_seconds`, but
    always for the first update and the last step. Counts wall time, so the time left includes evaluations and saves.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        first_step: int,
        enabled: bool,
        plain_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`first_step` is the first that this life trains; the first of a run is 1."""
        self._total_steps = total_steps
        self._done_before = max(0, first_step - 1)
        self._enabled = enabled
        self._plain_seconds = plain_seconds
        self._clock = clock
        self._start = clock()
        self._first_update: tuple[int, float] | None = None
        self._last_print = -math.inf
        self._bar: Progress | None = None

    def __enter__(self) -> TrainingProgress:
        self._start = self._clock()
        if self._enabled and _is_terminal():
            self._bar = _make_bar()
            self._bar.add_task("train", total=self._total_steps, completed=self._done_before, facts="starting")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, step: int, *, loss: float, tokens_per_second: float, mfu: float | None) -> None:
        """`step` steps of the run are done. `mfu` from 0 to 1, or None or nan where the peak is not known."""
        if not self._enabled:
            return
        now = self._clock()
        facts = _describe(loss, tokens_per_second, mfu, self._seconds_left(step, now))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, facts=facts)
            return
        if step >= self._total_steps or now - self._last_print >= self._plain_seconds:
            self._last_print = now
            _print_line(f"step {step}/{self._total_steps}  {facts}")

    def print(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            _print_line(text)

    def _seconds_left(self, step: int, now: float) -> float:
        """At the mean rate since the first update, which had the start-up in it; until there is a second, at the rate so far."""
        if self._first_update is None or step <= self._first_update[0]:
            self._first_update = (step, now)
            since_step, since = self._done_before, self._start
        else:
            since_step, since = self._first_update
        return (self._total_steps - step) * (now - since) / max(1, step - since_step)


def _is_terminal() -> bool:
    # Not rich's answer: FORCE_COLOR makes it yes, and a live bar fills the log of a batch job.
    return sys.stderr.isatty() and os.environ.get("TERM") not in (None, "", "dumb", "unknown")


def _make_bar() -> Progress:
    return Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[facts]}"),
        console=Console(stderr=True),
        expand=True,
        refresh_per_second=4,  # the cores belong to the training
    )


def _describe(loss: float, tokens_per_second: float, mfu: float | None, seconds_left: float) -> str:
    share = "" if mfu is None or math.isnan(mfu) else f"  MFU {100 * mfu:.1f} %"
    return f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s{share}  {_duration(seconds_left)} left"


def _duration(seconds: float) -> str:
    """`4:05`, `2:04:05`, `3d 2:04:05`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if hours == 0:
        return f"{minute}:{second:02d}"
    return f"{f'{days}d ' if days else ''}{hour}:{minute:02d}:{second:02d}"


def _print_line(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
