"""A pool of local processes that form gloo process groups: `RankPool().run(4, function, ...)` runs it on ranks 0..3.

Processes are started once, by forkserver with torch loaded (0.3 s; spawn takes seconds, plain fork hangs once torch has threads),
and form a new group for each call. A rank that raises ends the call with its own traceback; the pool is then emptied, since its
peers may hang.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megatronish.comm.history import History, recording
from megatronish.comm.recording import Recorder, register_recording_backend

PRELOAD = ("torch", "torch.distributed")


class RankError(AssertionError):
    """A rank failed; the text holds its traceback."""


class RankPool:
    """Local processes, each one rank of the worlds that `run` forms. Close it, or use it as a context manager."""

    def __init__(self, *, preload: Sequence[str] = ()) -> None:
        """`preload`: modules that the fork server imports once, so that each rank starts with them."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*PRELOAD, *preload])
        self._workers: list[tuple[Any, Connection]] = []

    def run(
        self, count: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0, recorded: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Call `function(rank, *args, **kwargs)`, a module-level function, on every rank; results in the order of ranks.

        recorded: gloo groups are wrapped by the recorder, and the function gets a `recorder` as well. RankError if a rank fails, or
        gives no result within `timeout` seconds of the one before."""
        self._grow(count)
        workers = self._workers[:count]
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, connection) in enumerate(workers):
                connection.send((function, rank, count, os.path.join(folder, "store"), recorded, args, kwargs))
            results = self._collect({connection: rank for rank, (_, connection) in enumerate(workers)}, timeout)
        return [results[rank] for rank in range(count)]

    def close(self) -> None:
        """End all processes."""
        for process, connection in self._workers:
            process.kill()
            connection.close()
        for process, _ in self._workers:
            process.join()
        self._workers = []

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _grow(self, count: int) -> None:
        while len(self._workers) < count:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self, waiting: dict[Connection, int], timeout: float) -> dict[int, Any]:
        results: dict[int, Any] = {}
        while waiting:
            ready = wait(list(waiting), timeout=timeout)
            if not ready:
                missing = sorted(waiting.values())
                self.close()
                raise RankError(f"ranks {missing} gave no result within {timeout} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    ok, value = connection.recv()
                except EOFError:
                    ok, value = False, "the process died"
                if not ok:
                    self.close()
                    raise RankError(f"rank {rank} failed:\n{value}")
                results[rank] = value
        return results


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    # What was imported stays; looking through it took 0.14 s of each collection.
    gc.freeze()
    # A killed test run must not leave ranks computing.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            function, rank, world_size, store_file, recorded, args, kwargs = connection.recv()
        except EOFError:
            return
        recorder = Recorder()
        try:
            backend = "gloo"
            if recorded:
                kwargs["recorder"] = recorder
                backend = register_recording_backend(recorder, wrap_gloo=True)
            if world_size > 1:
                dist.init_process_group(backend, store=dist.FileStore(store_file, world_size), rank=rank, world_size=world_size)
            with recording(recorder.history if recorded else History()):
                result = (True, function(rank, *args, **kwargs))
        except BaseException:
            result = (False, traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        # A group that a cycle of hooks keeps alive keeps its threads too, and gloo's spin once their peers are gone: 800 busy
        # threads after fifty cases.
        kwargs = args = function = None
        gc.collect()
        connection.send(result)
