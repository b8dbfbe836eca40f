"""Save a checkpoint while the training goes on: the same steps as `save.py`, with the disk's part on a thread.

    start      copy this rank's pieces to host memory; a thread writes and digests them
    poll       between two steps: one all-gather of rows. All written: rank 0's thread commits. Committed: done
    finish     wait, and poll to the end

The ranks meet between steps, on the thread that trains, and never on the one that writes: two threads that communicate would order
their collectives differently on different ranks. What a rank does next follows from gathered rows alone, so all ranks do the same
at the same step, a failure included; and while a save is under way every step costs one small all-gather, no more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from megatronish.checkpoint.pieces import Piece
from megatronish.checkpoint.save import Part, Row, SaveJob, accept, commit, failure_row, gather, write_own_part
from megatronish.checkpoint.storage import file_order
from megatronish.comm import streams

T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was completed."""

    path: Path
    seconds: float
    """From its start."""


class BackgroundSaver:
    """Saves one checkpoint at a time. `work="inline"` does in `start` what a thread would do: for a rehearsal."""

    def __init__(self, *, work: Literal["thread", "inline"] = "thread") -> None:
        self._inline = work == "inline"
        self._staging = Staging()
        self._save: _Save | None = None

    @property
    def step_under_way(self) -> int | None:
        """The step whose save has not ended yet."""
        return self._save.job.step if self._save is not None else None

    def start(self, job: SaveJob) -> None:
        """Copy `job.local` and begin to save it; returns when the values may change. No other save may be under way.

        Waits for a copy in host memory; on GPU for nothing (the copy is ordered before what follows on the device)."""
        assert self._save is None, f"the save of step {self.step_under_way} is under way"
        if self._inline:
            self._save = _Save(job, _Task(partial(write_own_part, job), inline=True))
            return
        job = replace(job, local=self._staging.copy(job.local))
        copied = streams.end_of_work(job.device)

        def write() -> Part:
            copied()
            return write_own_part(job)

        self._save = _Save(job, _Task(write, inline=False))

    def poll(self) -> Saved | None:
        """Go on with the save under way, if there is one; what was saved, once it is complete. Collective over the job's `world`
        while one is under way: one all-gather, which waits for all ranks but for no disk.

        Raises on all ranks alike what made any of them fail (UserError for the disk's errors); then nothing is under way, and
        earlier checkpoints are whole."""
        save = self._save
        if save is None:
            return None
        part = save.task.result if save.task.is_done else Part(Row(pending=1, attempt=save.job.attempt))
        rows = gather(save.job, part)
        if any(row.pending for row in rows):
            return None
        self._save = None
        accept(save.job, rows, part.error)
        if save.is_committing:
            return Saved(save.job.final, time.perf_counter() - save.started)
        save.is_committing = True
        save.task = _Task(lambda: _commit(save.job, part.plan, rows), inline=self._inline or save.job.world.index > 0)
        self._save = save
        return None

    def finish(self) -> Saved | None:
        """`poll` until the save under way, if there is one, is complete. Waits for the disk. Collective as `poll`."""
        saved = None
        while self._save is not None:
            self._save.task.wait()
            saved = self.poll()
        return saved


def _commit(job: SaveJob, plan: Sequence[Sequence[Piece]], rows: Sequence[Row]) -> Part:
    """Rank 0's last act; the others have nothing to do. Never raises an Exception."""
    done = Part(Row(attempt=job.attempt))
    if job.world.index > 0:
        return done
    try:
        commit(job, plan, rows)
        return done
    except Exception as error:
        return Part(failure_row(job, error), error)


class _Task(Generic[T]):
    """A function's result, in time. On a daemon thread: a process that ends does not wait for it."""

    def __init__(self, work: Callable[[], T], *, inline: bool) -> None:
        self._results: list[T] = []
        self._thread: threading.Thread | None = None
        if inline:
            self._results.append(work())
        else:
            self._thread = threading.Thread(target=lambda: self._results.append(work()), name="checkpoint", daemon=True)
            self._thread.start()

    @property
    def is_done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    @property
    def result(self) -> T:
        assert self._results, "the thread died; its traceback is on standard error"
        return self._results[0]

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()


@dataclass
class _Save:
    """The save under way."""

    job: SaveJob
    task: _Task[Part]
    is_committing: bool = False
    started: float = field(default_factory=time.perf_counter)


class Staging:
    """Host memory for a copy of a rank's pieces, used again by every save; pinned where they lie on a GPU."""

    def __init__(self) -> None:
        self._layout: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        self._views: dict[str, Tensor] = {}

    def copy(self, local: Sequence[tuple[Piece, Tensor]]) -> list[tuple[Piece, Tensor]]:
        """The same pieces with their values as they are when the device comes here. What the last call gave is overwritten."""
        layout = [(piece.key, piece.box.sizes, tensor.dtype) for piece, tensor in local]
        if layout != self._layout:
            self._layout, self._views = layout, _place(local)
        for piece, tensor in local:
            self._views[piece.key].copy_(tensor.detach().reshape(piece.box.sizes), non_blocking=True)
        return [(piece, self._views[piece.key]) for piece, _ in local]


def _place(local: Sequence[tuple[Piece, Tensor]]) -> dict[str, Tensor]:
    """A view of new host memory for each piece; larger elements first, so that all are aligned to theirs."""
    tensors = {piece.key: tensor.detach().reshape(piece.box.sizes) for piece, tensor in local}
    if not tensors:
        return {}
    device = local[0][1].device
    memory = streams.host_memory(sum(tensor.nbytes for tensor in tensors.values()), device)
    views, start = {}, 0
    for key in file_order(tensors):
        tensor = tensors[key]
        views[key] = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += tensor.nbytes
    return views
