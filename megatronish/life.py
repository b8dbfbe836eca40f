"""One life of a run at a time. RUN/life.json names the launch that the run belongs to, and its modification time says it lives.

Slurm may start the next life of a job while ranks of the last one still run on a node that it lost. So a checkpoint becomes one
only if the file still names its own launch, read again just before, and a life that finds another name there ends. A file that
cannot be read says nothing: the steps go on, and no checkpoint is completed before it can be read."""

from __future__ import annotations

import contextlib
import errno
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

from megatronish.errors import SUPERSEDED, Fault, Superseded, UserError, disk_error
from megatronish.json_file import write_json
from megatronish.observe.post_mortem import state_of_process
from megatronish.retries import NUM_TRIES, retried

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
        self.continues_job = False
        """Once begun: whether the life before was of the same job, whose launcher started this one by itself."""
        self._values: dict[str, Any] = {}
        self._beat = beat_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="life", daemon=True)

    def __enter__(self) -> Life:
        """UserError, one line, if another job is at work in this folder; Fault if that cannot be read. May watch for a few seconds
        to know."""
        before = self._find_before()
        self.continues_job = before is not None and _is_later(self._job, self._order, before)
        process = {"host": socket.gethostname(), "pid": os.getpid(), "started": state_of_process(os.getpid())[1]}
        self._values = {"token": self.token, "job": self._job, "order": self._order, **process, "time": time.time()}
        write_json(self.path, self._values, advice=_ADVICE)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join(timeout=10.0)
        with contextlib.suppress(OSError, UserError):  # a disk that fails hides no other error
            if retried(self._owner) == self.token:
                write_json(self.path, {**self._values, "ended": time.time()}, advice=_ADVICE)

    def is_current(self) -> bool:
        """False once the file names another life. One read: where that fails, this life goes on for now."""
        try:
            return self._owner() == self.token
        except OSError:
            return True

    def require_current(self) -> None:
        """Superseded if the file names another life; Fault if nobody can say. May wait for a few seconds to know."""
        try:
            owner = retried(self._owner, passing=lambda error: True)
        except OSError as error:
            raise Fault(
                f"{self.path}: cannot be read ({error.strerror}, {NUM_TRIES} tries); whether this life may still write is "
                "not known: it ends, unsaved"
            ) from None
        if owner != self.token:
            raise Superseded(f"{self.path.parent} now belongs to {owner}, not to {self.token} any more: this life ends, unsaved")

    def _owner(self) -> str:
        """The token of the life that the run belongs to. OSError where the file does not say."""
        found = _read(self.path)
        if found is None or "token" not in found:
            raise OSError(errno.ENODATA, "it names no life")
        return str(found["token"])

    def _find_before(self) -> dict[str, Any] | None:
        """What the file says before this life takes over, which it may."""
        try:
            before = retried(lambda: _read(self.path))
            is_free = before is None or _is_later(self._job, self._order, before) or not self._is_alive(before)
        except OSError as error:
            raise disk_error(error.errno)(
                f"{self.path}: cannot be read ({error.strerror}), so nobody knows whether another life is at work: check run_root"
            ) from None
        if not is_free:
            assert before is not None
            raise UserError(
                f"{self.path.parent} is the folder of a run at work: {before.get('job')}, process {before.get('pid')} on "
                f"{before.get('host')}; end that first, or use another name"
            )
        return before

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
        first, stop = retried(self._beaten), time.monotonic() + 2 * self._beat + 1
        while time.monotonic() < stop:
            time.sleep(0.2)
            if retried(self._beaten) != first:
                return "ended" not in (retried(lambda: _read(self.path)) or {})
        return False

    def _beaten(self) -> float:
        """When; 0 if there is no file any more."""
        try:
            return self.path.stat().st_mtime
        except FileNotFoundError:
            return 0.0


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
            try:
                found = _read(path)
            except OSError:
                continue
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
    """What the file says; None if it is not there, or says nothing (it is not flushed, and may be empty after a power cut). OSError
    if it cannot be read."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None
