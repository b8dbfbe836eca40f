"""Rehearse one pipeline stage: a few ranks run, the others are inferred from what these asked their coordinates.

A rank is inferred from one that ran if both would have answered every question alike (`coordinates.py`). In any case the first, an
inner and the last rank of each axis run: in the first and the last stage every combination of them over the axes, in the other
stages the three in which all axes agree. If two of these did different things though they answered alike, questions do
not tell: then every rank of the stage runs. Up to where its groups are made, every rank runs in any case.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from megatronish.assemble import mesh_shape
from megatronish.config import Config
from megatronish.errors import UserError
from megatronish.parallel.mesh import AXES, MeshShape
from megatronish.preflight.job import Log
from megatronish.preflight.rehearse import MEETING, Groups, Rehearsal, rehearse, rehearse_meeting
from megatronish.preflight.replay import Microbatches

INNER_AXES = tuple(axis for axis in AXES if axis != "pp")


class RankFailed(Exception):
    """A rank's own code failed; the text says which and how."""


@dataclass(frozen=True)
class Plan:
    """What to rehearse."""

    config: Config
    """As short as it is to be rehearsed."""
    world_size: int
    device_kind: str
    microbatches: Microbatches
    every_rank: bool

    @property
    def shape(self) -> MeshShape:
        return mesh_shape(self.config, self.world_size)


@dataclass(frozen=True)
class PartOfJob:
    """Some ranks of one stage."""

    logs: Sequence[Log]
    """Distinct ones."""
    log_of: Mapping[int, int]
    """By rank: its log's place in `logs`."""
    groups: Mapping[int, Groups]
    """By rank."""
    ran: Sequence[int]
    """The ranks that ran; all others are inferred."""
    num_actions_run: int
    """Forwards and backwards of microbatches, of the ranks that ran."""
    num_actions_inferred: int


def ranks_of_stage(shape: MeshShape, stage: int) -> list[int]:
    """In order."""
    sizes = [range(getattr(shape, axis)) for axis in INNER_AXES]
    return [shape.rank_of({"pp": stage, **dict(zip(INNER_AXES, at, strict=True))}) for at in itertools.product(*sizes)]


def corners(shape: MeshShape, stage: int) -> list[int]:
    """The ranks of a stage that run in any case."""
    places = {axis: (0, min(1, size - 1), size - 1) for axis in INNER_AXES for size in [getattr(shape, axis)]}
    every_combination = stage in (0, shape.pp - 1)
    coordinates = list(itertools.product(*places.values()) if every_combination else zip(*places.values(), strict=True))
    return sorted({shape.rank_of({"pp": stage, **dict(zip(places, at, strict=True))}) for at in coordinates})


def rehearse_part(plan: Plan, stage: int, ranks: Sequence[int] | None = None) -> PartOfJob:
    """The logs of a stage's ranks; of `ranks` alone, each of them run, where they are given."""
    shape = plan.shape
    everyone = ranks_of_stage(shape, stage)
    must_run = corners(shape, stage) if ranks is None else ranks
    runs = {rank: _rehearse(plan, rank) for rank in must_run}
    if ranks is None and _contradict(runs, shape):
        runs |= {rank: _rehearse(plan, rank) for rank in everyone if rank not in runs}
    source: dict[int, int] = {}
    for rank in everyone if ranks is None else ranks:
        alike = (other for other, run in runs.items() if run.questions.same_answers(shape.coordinates(rank)))
        source[rank] = rank if rank in runs else next(alike, rank)
        if source[rank] not in runs:
            runs[rank] = _rehearse(plan, rank)
    return _join(plan, runs, source)


def _contradict(runs: Mapping[int, Rehearsal], shape: MeshShape) -> bool:
    """Whether two ranks did different things though they answered alike: then questions do not tell who does what."""
    return any(
        run.log != other.log and run.questions.same_answers(shape.coordinates(rank))
        for run in runs.values()
        for rank, other in runs.items()
    )


def _rehearse(plan: Plan, rank: int) -> Rehearsal:
    with _as_rank(plan, rank):
        return rehearse(
            plan.config,
            rank=rank,
            world_size=plan.world_size,
            device_kind=plan.device_kind,
            microbatches=plan.microbatches,
        )


@contextmanager
def _as_rank(plan: Plan, rank: int) -> Iterator[None]:
    """Any failure but a user's mistake becomes a RankFailed."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        where = f"rank {rank} [{plan.shape.describe(rank)}]"
        raise RankFailed(f"{where} fails in its rehearsal, as it would in the job:\n{traceback.format_exc().rstrip()}") from error


def _join(plan: Plan, runs: Mapping[int, Rehearsal], source: Mapping[int, int]) -> PartOfJob:
    logs: list[Log] = []
    log_of: dict[int, int] = {}
    groups: dict[int, Groups] = {}
    place_of_run = {rank: _place(logs, run.log) for rank, run in runs.items()}
    for rank, from_rank in source.items():
        run = runs[from_rank]
        if rank == from_rank:
            log_of[rank], groups[rank] = place_of_run[rank], run.groups
            continue
        # It has no coordinates to ask before its groups are made: up to there every rank runs.
        with _as_rank(plan, rank):
            meeting, groups[rank] = rehearse_meeting(
                plan.config, rank=rank, world_size=plan.world_size, device_kind=plan.device_kind
            )
        num = sum(span.moment.phase in MEETING for span in run.log.spans)
        same = tuple(meeting.spans) == tuple(run.log.spans[:num])
        log_of[rank] = place_of_run[from_rank] if same else _place(logs, Log((*meeting.spans, *run.log.spans[num:])))
    return PartOfJob(
        logs,
        log_of=log_of,
        groups=groups,
        ran=list(runs),
        num_actions_run=sum(run.num_run for run in runs.values()),
        num_actions_inferred=sum(run.num_inferred for run in runs.values()),
    )


def _place(logs: list[Log], log: Log) -> int:
    """Where an equal log is, put there if there is none."""
    place = next((i for i, known in enumerate(logs) if known == log), len(logs))
    if place == len(logs):
        logs.append(log)
    return place
