"""One life of a run at a time. RUN/life.json names the launch that the run belongs to, and its modification time says it lives.

Slurm may start the next life of a job while ranks of the last one still run on a node that it lost. So a checkpoint becomes one
only if the file still names its own launch, read again just before, and a life that finds another name there ends."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from megatronish.errors import SUPERSEDED, Superseded, UserError
from megatronish.json_file import write_json
from megatronish.observe.post_mortem import state_of_process

FILE_NAME = "life.json"
_ADVICE = "free space, or change run_root"
BEAT_SECONDS = 5.0
WATCH_SECONDS = 10.0


class Life:
    """Context manager of the rank that writes: takes the run over, or refuses. `launch`: of a job (`slurm-JOB.STEP`, or a
    launcher's own name), its `restart`: a later life of the same job takes over from an earlier one, whatever that still does."""

    def __init__(self, run_dir: Path, launch: str, restart: int, *, beat_seconds: float = BEAT_SECONDS) -> None:
        self.path = run_dir / FILE_NAME
        self._job, self._order = _job_and_order(launch, restart)
        self.number = secrets.randbits(48)
        """Not every launcher gives its launches names of their own."""
        self.token = token_of(f"{launch}/{restart}", self.number)
        self._beat = beat_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="life", daemon=True)

    def __enter__(self) -> Life:
        """UserError, one line, if another job is at work in this folder. May watch for a few seconds to know."""
        before = _read(self.path)
        if before is not None and not _is_later(self._job, self._order, before) and self._is_alive(before):
            raise UserError(
                f"{self.path.parent} is the folder of a run at work: {before.get('job')}, process {before.get('pid')} on "
                f"{before.get('host')}; end that first, or use another name"
            )
        process = {"host": socket.gethostname(), "pid": os.getpid(), "started": state_of_process(os.getpid())[1]}
        write_json(
            self.path, {"token": self.token, "job": self._job, "order": self._order, **process, "time": time.time()}, advice=_ADVICE
        )
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join(timeout=10.0)
        if self.is_current():
            with contextlib.suppress(UserError):  # a disk that fails hides no other error
                write_json(self.path, {**(_read(self.path) or {}), "ended": time.time()}, advice=_ADVICE)

    def is_current(self) -> bool:
        """Whether no other life has begun."""
        found = _read(self.path)
        return found is not None and found.get("token") == self.token

    def require_current(self) -> None:
        """Superseded unless it is."""
        if not self.is_current():
            other = (_read(self.path) or {}).get("token", "nobody")
            raise Superseded(f"{self.path.parent} now belongs to {other}, not to {self.token} any more: this life ends, unsaved")

    def _keep_beating(self) -> None:
        while not self._ended.wait(self._beat):
            if not self.is_current():
                return
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _is_alive(self, before: dict[str, Any]) -> bool:
        if "ended" in before:
            return False
        if before.get("host") == socket.gethostname():
            state, started = state_of_process(int(before.get("pid", 0)))
            return state not in ("", "Z") and started == before.get("started") and before.get("pid") != os.getpid()
        # Clocks of hosts differ, and some file systems keep the writer's: only a change counts. Two beats, and a life shows itself.
        first, stop = self.path.stat().st_mtime, time.monotonic() + 2 * self._beat + 1
        while time.monotonic() < stop:
            time.sleep(0.2)
            with contextlib.suppress(OSError):
                if self.path.stat().st_mtime != first:
                    return "ended" not in (_read(self.path) or {})
        return False


def token_of(launch: str, number: int) -> str:
    """The name of one launch of the ranks, which no other has."""
    return f"{launch}/{number:012x}"


@contextlib.contextmanager
def ended_by_later_life(run_dir: Path, launch: str, restart: int, *, watch_seconds: float = WATCH_SECONDS) -> Iterator[None]:
    """Context manager of every rank: once RUN/life.json names a later life of the same job, this process ends, with code 79.

    Slurm has then lost this rank's node, and given the job others. Its peers are gone without a word, so it would wait in a
    collective, on a GPU that the node may soon have to give to somebody else."""
    path, (job, order), over = run_dir / FILE_NAME, _job_and_order(launch, restart), threading.Event()

    def watch() -> None:
        while not over.wait(watch_seconds):
            found = _read(path)
            # Only a later life of the same job: a file system may still show an older file, which never is one.
            if found is not None and _is_later(found.get("job"), found.get("order", []), {"job": job, "order": order}):
                sys.stderr.write(f"{run_dir} now belongs to {found.get('token')}: {launch}/{restart} ends, unsaved\n")
                sys.stderr.flush()
                os._exit(SUPERSEDED)  # the main thread may wait in C++ for ever

    thread = threading.Thread(target=watch, name="later life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def _job_and_order(launch: str, restart: int) -> tuple[str, list[int]]:
    """The job that a launch is of, and what is greater for its later lives: (restart, step)."""
    job, _, step = launch.partition(".") if launch.startswith("slurm-") else (launch, "", "")
    return job, [restart, int(step) if step.isdecimal() else 0]


def _is_later(job: object, order: list[int], than: dict[str, Any]) -> bool:
    """Whether a life of `job` takes over from `than`. Other launchers than Slurm count restarts, but do not name their jobs."""
    return str(job).startswith("slurm-") and than.get("job") == job and than.get("order", []) < order


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
