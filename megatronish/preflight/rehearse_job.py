"""Rehearse every rank of a job, on all cores of this machine."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch

from megatronish.preflight.classes import PartOfJob, Plan, RankFailed, ranks_of_stage, rehearse_part
from megatronish.preflight.job import Job, Log, Span
from megatronish.preflight.rehearse import Groups
from megatronish.remember import remember_from_now_on, remembering

PRELOAD = ("torch", "torch.distributed", "megatronish.preflight.preload")
RANKS_OF_A_TASK = 8
"""Where every rank runs."""


@dataclass(frozen=True)
class RehearsedJob:
    """A job's logs, and how they came about."""

    job: Job
    ran: tuple[int, ...]
    """Ranks that ran; the others are inferred."""
    num_actions_run: int
    """Forwards and backwards of microbatches, of the ranks that ran."""
    num_actions_inferred: int

    @property
    def num_inferred(self) -> int:
        return self.job.num_ranks - len(self.ran)


def rehearse_job(plan: Plan, *, processes: int | None = None, progress: Callable[[PartOfJob], None] | None = None) -> RehearsedJob:
    """Every rank. `processes`: how many at a time, by default one a core; 0: in this process. `progress` hears of each part."""
    shape = plan.shape
    tasks: list[tuple[int, list[int] | None]] = [(stage, None) for stage in range(shape.pp)]
    if plan.every_rank:
        tasks = [
            (stage, ranks[start : start + RANKS_OF_A_TASK])
            for stage in range(shape.pp)
            for ranks in [ranks_of_stage(shape, stage)]
            for start in range(0, len(ranks), RANKS_OF_A_TASK)
        ]
    tell = progress or (lambda part: None)
    processes = min(len(tasks), processes if processes is not None else len(os.sched_getaffinity(0)))
    joined = _Joined(plan)
    if processes <= 1:
        with remembering():
            for task in tasks:
                joined.add(part := rehearse_part(plan, *task))
                tell(part)
        return joined.result()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin) as pool:
        # First and last stages hold most: they begin.
        order = sorted(tasks, key=lambda task: min(task[0], shape.pp - 1 - task[0]))
        futures = [pool.submit(rehearse_part, plan, *task) for task in order]
        try:
            for future in as_completed(futures):
                joined.add(part := future.result())
                tell(part)
        except BrokenProcessPool as error:
            raise RankFailed(
                "a process of the rehearsal was ended from outside, perhaps for its memory: "
                f"try --processes {max(1, processes // 2)}"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return joined.result()


def _begin() -> None:
    """A process that rehearses ranks of one job until it ends."""
    # One thread: the fork server has loaded torch, and a forked OpenMP pool would hang.
    torch.set_num_threads(1)
    # What was imported stays; looking through it took 0.14 s of each collection.
    gc.freeze()
    remember_from_now_on()


class _Joined:
    """Puts parts together; equal logs, and equal events of all logs, become one object."""

    def __init__(self, plan: Plan) -> None:
        self._shape = plan.shape
        self._logs: list[Log] = []
        self._place: dict[tuple[object, ...], int] = {}
        self._events: dict[object, object] = {}
        self._log_of = [-1] * self._shape.num_ranks
        self._groups: list[Groups] = [{}] * self._shape.num_ranks
        self._members: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._ran: list[int] = []
        self._num_run = self._num_inferred = 0

    def add(self, part: PartOfJob) -> None:
        """See class."""
        places = [self._known(log) for log in part.logs]
        for rank, log in part.log_of.items():
            self._log_of[rank] = places[log]
            self._groups[rank] = {name: self._members.setdefault(m, m) for name, m in part.groups[rank].items()}
        self._ran += part.ran
        self._num_run += part.num_actions_run
        self._num_inferred += part.num_actions_inferred

    def _known(self, log: Log) -> int:
        spans = tuple(Span(span.moment, self._events.setdefault(span.events, span.events), span.is_inferred) for span in log.spans)  # type: ignore[arg-type]
        key = tuple((span.moment, id(span.events)) for span in spans)
        if key not in self._place:
            self._place[key] = len(self._logs)
            self._logs.append(Log(spans))
        return self._place[key]

    def result(self) -> RehearsedJob:
        """All of it."""
        assert -1 not in self._log_of, "a rank belongs to no stage"
        job = Job(self._shape, self._logs, self._log_of, self._groups, num_run=len(self._ran))
        return RehearsedJob(job, tuple(sorted(self._ran)), self._num_run, self._num_inferred)
