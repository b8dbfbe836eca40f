"""RUN/failures/rank-00003.json: why a rank failed. srun's exit code is the highest of all tasks', and hides it.

`python -m megatronish.failures RUN MARK CODE JOB` says which rank of that Slurm job failed first since the file MARK was written,
and exits with the job's code. Imports nothing heavy: batch scripts run it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatronish.errors import code_of_job

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


def leave(run: Path, failure: Failure) -> None:
    """Write it. A disk that fails does not hide the failure."""
    folder = run / FOLDER
    with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)
        if failure.lost_peer and len(since(run, failure.time - 60)) >= _MOST:
            return
        temporary = folder / f".{failure.rank}.{os.getpid()}"
        temporary.write_text(json.dumps(asdict(failure)))
        temporary.replace(folder / f"rank-{failure.rank:05d}.json")


def now(rank: int, world_size: int, launch: str, *, where: str, error: str, code: int, lost_peer: bool) -> Failure:
    """A failure of this process."""
    return Failure(rank, world_size, socket.gethostname(), where, error, code, lost_peer, launch, time.time())


def since(run: Path, moment: float) -> list[Failure]:
    """Failures written after `moment` of the file system's clock: the first first, those that explain themselves before others."""
    found = []
    with contextlib.suppress(OSError):
        for path in (run / FOLDER).glob("rank-*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError):
                if path.stat().st_mtime >= moment:
                    found.append(Failure(**json.loads(path.read_text())))
    return sorted(found, key=lambda failure: (failure.lost_peer, failure.time))


def latest(run: Path) -> Failure | None:
    """The first failure of the launch that failed last."""
    found = since(run, 0.0)
    if not found:
        return None
    launch = max(found, key=lambda failure: failure.time).launch
    return next(failure for failure in found if failure.launch == launch)


def main(run: Path, mark: Path, code: int, job: str) -> int:
    """Print the first failure since `mark`; the job's exit code, `code` being the launcher's."""
    if code == 0:
        return 0
    # Another job may have been refused this folder meanwhile.
    found = [
        at for at in since(run, mark.stat().st_mtime) if not at.launch.startswith("slurm-") or at.launch.startswith(f"slurm-{job}.")
    ]
    if found:
        unexplained = "; no rank gives a reason of its own: one was killed (out of memory?), or its node is lost"
        print(f"first failure: {found[0].describe(run)}{unexplained if found[0].lost_peer else ''}", file=sys.stderr)
    # The launcher's own code may be that of a rank which was stopped for another's failure.
    return code_of_job([*(failure.code for failure in found), code])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
