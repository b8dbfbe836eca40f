"""`touch RUN/STOP`: save and end. `touch RUN/SAVE`: save now and go on.

One rank looks, on log steps, where the host waits anyway; all ranks act after the same step: at most observe.log_interval
steps after the touch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatronish.comm import Group, all_reduce
from megatronish.comm.host import read_values

STOP, SAVE = "STOP", "SAVE"


@dataclass(frozen=True)
class Requests:
    """What somebody has asked the run for."""

    stop: bool = False
    save: bool = False


class RequestFiles:
    """The two files. `looks`: this rank reads and removes them; the others, and a rehearsal, hear of them."""

    def __init__(self, run_dir: Path, *, looks: bool) -> None:
        self._paths = {name: run_dir / name for name in (STOP, SAVE)}
        self._looks = looks

    def remove_old(self) -> list[Path]:
        """Remove what was asked before this start, of another life of the run; returns what was there."""
        return self._remove(Requests(stop=True, save=True))

    def ask(self, *, world: Group, device: torch.device) -> Requests:
        """What is asked for now: the same answer on every rank. Collective over `world`, one all-reduce of two numbers; waits."""
        seen = [float(self._looks and path.exists()) for path in self._paths.values()]
        answer = all_reduce(torch.tensor(seen, device=device), world, "max", what="requests")
        stop, save = read_values(answer, [0.0, 0.0])
        return Requests(stop=stop > 0, save=save > 0)

    def answered(self, requests: Requests) -> None:
        """What was asked is done: remove the files. A request made meanwhile is taken as answered by the same save."""
        self._remove(requests)

    def _remove(self, requests: Requests) -> list[Path]:
        wanted = {STOP: requests.stop, SAVE: requests.save}
        found = [path for name, path in self._paths.items() if self._looks and wanted[name] and path.exists()]
        for path in found:
            path.unlink(missing_ok=True)
        return found
