"""RUN/failures/LAUNCH/rank-00003.json: why a rank failed. srun's exit code is the highest of all tasks', and hides it.

`python -m megatronish.failures RUN MARK CODE JOB RESTART` says which rank of that life of a Slurm job failed first since the file
MARK was written, and prints the job's exit code and the host of that rank. Imports nothing heavy: batch scripts run it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatronish.errors import SUPERSEDED, code_of_job

FOLDER = "failures"
_MOST = 8
"""After so many, ranks that only lost a peer write no more."""


@dataclass(frozen=True)
class Failure:
    """Why a rank failed."""

    rank: int
    world_size: int
    host: str
    where: str
    """Phase and step of the run, e.g. `train step 17 F3`."""
    error: str
    """One line."""
    code: int
    lost_peer: bool
    """It only saw another rank go."""
    launch: str
    time: float

    def describe(self, run: Path) -> str:
        """One line."""
        log = run / "logs" / f"rank-{self.rank:05d}.log"
        return f"rank {self.rank} of {self.world_size} on {self.host}, {self.where}: {self.error} ({log})"


def folder_of(run: Path, launch: str) -> Path:
    """Where the ranks of one launch leave theirs."""
    return run / FOLDER / re.sub(r"[^\w.-]", "_", launch)


def leave(run: Path, failure: Failure) -> None:
    """Write it. A disk that fails does not hide the failure."""
    folder = folder_of(run, failure.launch)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if failure.lost_peer:
            # Thousands may see a peer go at once: a few of them say so.
            time.sleep(random.uniform(0.0, failure.world_size / 1000))
            if len(os.listdir(folder)) >= _MOST:
                return
        temporary = folder / f".{failure.rank}.{os.getpid()}"
        temporary.write_text(json.dumps(asdict(failure)))
        temporary.replace(folder / f"rank-{failure.rank:05d}.json")


def forget(run: Path, launch: str) -> None:
    """Remove what an earlier launch of the same name left: not every launcher gives them names of their own."""
    shutil.rmtree(folder_of(run, launch), ignore_errors=True)


def now(rank: int, world_size: int, launch: str, *, where: str, error: str, code: int, lost_peer: bool) -> Failure:
    """A failure of this process."""
    return Failure(rank, world_size, socket.gethostname(), where, error, code, lost_peer, launch, time.time())


def of_launch(folder: Path) -> list[Failure]:
    """What is in a launch's folder: the first first, those that explain themselves before others."""
    found = []
    for path in folder.glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Failure(**json.loads(path.read_text())))
    return sorted(found, key=lambda failure: (failure.lost_peer, failure.time))


def latest(run: Path) -> Failure | None:
    """The first failure of the launch that failed last."""
    folders = sorted((path for path in (run / FOLDER).glob("*/")), key=lambda path: path.stat().st_mtime, reverse=True)
    return next((found[0] for folder in folders if (found := of_launch(folder))), None)


def main(run: Path, mark: Path, code: int, job: str, restart: str) -> int:
    """Say the first failure since `mark`; the job's exit code, `code` being the launcher's."""
    found: list[Failure] = []
    if code != 0:
        # What another job left, which was refused this folder, or ranks of an earlier life that Slurm has lost, is not this life's.
        for folder in (run / FOLDER).glob(f"slurm-{job}.*_{restart}/"):
            if folder.stat().st_mtime >= mark.stat().st_mtime:
                found += [failure for failure in of_launch(folder) if failure.code != SUPERSEDED]
    found.sort(key=lambda failure: (failure.lost_peer, failure.time))
    if found:
        unexplained = "; no rank gives a reason of its own: one was killed (out of memory?), or its node is lost"
        print(f"first failure: {found[0].describe(run)}{unexplained if found[0].lost_peer else ''}", file=sys.stderr)
    # The launcher's own code may be that of a rank which was stopped for another's failure.
    code = code_of_job([*(failure.code for failure in found), code])
    print(code, found[0].host if found and not found[0].lost_peer else "-")
    return code


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
