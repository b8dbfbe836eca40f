"""Processes that stay while variants take turns: what the benches that interleave share."""

from __future__ import annotations

import errno
import multiprocessing
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatronish.errors import UserError

_PATIENCE_SECONDS = 600.0


class Workers:
    """Processes that do what they are told, and what was measured on them. A process serves a connection: it answers when it is
    ready, and then each command; 0 ends it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.processes: list[Any] = []
        self.connections: list[Connection] = []
        self.rates: list[float] = []
        self.cpu_seconds: list[float] = []
        """Of all processes together, a step."""
        self.phases: list[dict[str, float]] = []

    def start(self, target: Any, *arguments: Any) -> None:
        """One more process: target(connection, *arguments)."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        process.start()
        theirs.close()
        self.processes.append(process)
        self.connections.append(ours)

    def answers(self) -> list[Any]:
        """One answer of every process."""
        result = []
        for connection in self.connections:
            if not connection.poll(_PATIENCE_SECONDS):
                raise RuntimeError(f"{self.name}: a process gave no answer within {_PATIENCE_SECONDS:.0f} s")
            try:
                result.append(connection.recv())
            except EOFError as error:
                raise RuntimeError(f"{self.name}: a process died; its error is above") from error
        return result

    def run(self, command: Any) -> list[Any]:
        """Give all processes a command; their answers."""
        for connection in self.connections:
            connection.send(command)
        return self.answers()

    def stop(self) -> None:
        """End all processes."""
        for connection in self.connections:
            try:
                connection.send(0)
            except OSError:
                continue
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


@contextmanager
def scratch_folder(parent: Path, option: str) -> Iterator[Path]:
    """A new folder in `parent`, which is made if it is not there; removed at the end. UserError where nothing can be written."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="megatronish-bench-", dir=parent))
    except OSError as error:
        raise UserError(f"{option} {parent}: cannot be written ({error.strerror}); name a folder of yours") from None
    try:
        yield folder
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{option} {parent}: {error.strerror}; free space, or measure less") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def processor_name() -> str:
    """The processor and its cores, as Linux names them."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"
