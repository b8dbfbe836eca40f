"""`touch RUN/STOP`: save and end. `touch RUN/SAVE`: save now and go on. A signal to any rank: save, end, and go on in another life.

One rank looks for files, on log steps, where the host waits anyway, and between them where steps are slow: a request is answered
within ANSWER_SECONDS, a step, or observe.log_interval steps. All ranks act after the same step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatronish.comm import Group, all_reduce
from megatronish.comm.host import read_values

STOP, SAVE = "STOP", "SAVE"
ANSWER_SECONDS = 10.0
"""Ranks ask each other so often, where log steps are further apart: the wait for the device is nothing in so long a time."""


@dataclass(frozen=True)
class Requests:
    """What somebody has asked the run for."""

    stop: bool = False
    save: bool = False
    requeue: bool = False
    """Save and end, for another life to go on."""
    superseded: bool = False
    """Another life has begun already."""


class RequestFiles:
    """The two files, `told`: whether a signal came to this rank, and `is_current`: whether the run is still this life's. `looks`:
    this rank reads and removes the files; the others, and a rehearsal, hear of them."""

    def __init__(
        self, run_dir: Path, *, looks: bool, told: Callable[[], bool] = lambda: False, is_current: Callable[[], bool] = lambda: True
    ) -> None:
        self._told, self._is_current = told, is_current
        self._paths = {name: run_dir / name for name in (STOP, SAVE)}
        self._looks = looks
        self._last: tuple[int, float] | None = None
        """Step and time of the last look."""
        self._seconds = 0.0
        """That a step took on this rank between its last two looks."""
        self._every = math.inf
        """Steps between looks, the same on every rank."""

    def is_due(self, step: int) -> bool:
        """Whether to ask after `step`, log step or not: the same answer on every rank."""
        return self._last is not None and step - self._last[0] >= self._every

    def remove_old(self, *, stop: bool) -> list[Path]:
        """Remove what was asked before this start, of another life of the run; returns what was there. `stop` false: a request to
        stop still holds, and this life ends after its first step."""
        return self._remove(Requests(stop=stop, save=True))

    def ask(self, step: int, *, world: Group, device: torch.device) -> Requests:
        """What is asked for after `step`: the same answer on every rank. Collective over `world`, one all-reduce of five numbers;
        waits."""
        seen = [float(self._looks and path.exists()) for path in self._paths.values()]
        seen += [float(self._told()), float(not self._is_current()), self._seconds]
        answer = all_reduce(torch.tensor(seen, device=device), world, "max", what="requests")
        stop, save, requeue, superseded, seconds = read_values(answer, [0.0] * 5)
        self._every = max(1, int(ANSWER_SECONDS / seconds)) if seconds else math.inf
        now = time.monotonic()
        if self._last is not None:
            self._seconds = (now - self._last[1]) / (step - self._last[0])
        self._last = step, now
        return Requests(stop=stop > 0, save=save > 0, requeue=requeue > 0, superseded=superseded > 0)

    def answered(self, requests: Requests) -> None:
        """What was asked is done: remove the files. A request made meanwhile is taken as answered by the same save."""
        self._remove(requests)

    def _remove(self, requests: Requests) -> list[Path]:
        wanted = {STOP: requests.stop, SAVE: requests.save}
        found = [path for name, path in self._paths.items() if self._looks and wanted[name] and path.exists()]
        for path in found:
            path.unlink(missing_ok=True)
        return found
