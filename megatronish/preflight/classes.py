"""Rehearse one pipeline stage: a few ranks run, the others are inferred from what these asked their coordinates.

A rank is inferred from one that ran if both would have answered every question alike (`coordinates.py`). In any case the first, an
inner and the last rank of each axis run: in the first, the middle and the last stage every combination of them over the axes, in
the other stages the three in which all axes agree.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatronish.assemble import mesh_shape
from megatronish.config import Config
from megatronish.errors import UserError
from megatronish.parallel.mesh import AXES, MeshShape
from megatronish.preflight.job import Log
from megatronish.preflight.rehearse import Rehearsal, rehearse
from megatronish.preflight.replay import Microbatches

INNER_AXES = tuple(axis for axis in AXES if axis != "pp")
Groups = Mapping[str, tuple[int, ...]]


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
    every_combination = stage in (0, shape.pp // 2, shape.pp - 1)
    coordinates = list(itertools.product(*places.values()) if every_combination else zip(*places.values(), strict=True))
    return sorted({shape.rank_of({"pp": stage, **dict(zip(places, at, strict=True))}) for at in coordinates})


def rehearse_part(plan: Plan, stage: int, ranks: Sequence[int] | None = None) -> PartOfJob:
    """The logs of a stage's ranks; of `ranks` alone, each of them run, where they are given."""
    shape = plan.shape
    waiting = dict.fromkeys(ranks_of_stage(shape, stage) if ranks is None else ranks)
    must_run = [rank for rank in waiting if ranks is not None or rank in corners(shape, stage)]
    runs: dict[int, Rehearsal] = {}
    source: dict[int, int] = {}
    while waiting:
        rank = must_run.pop(0) if must_run else next(iter(waiting))
        run = runs[rank] = _rehearse(plan, rank)
        source[rank] = rank
        del waiting[rank]
        inferred = [] if ranks is not None else _alike(run, waiting, shape, keep=must_run)
        for other in inferred:
            source[other] = rank
            del waiting[other]
    return _join(runs, source, shape)


def _rehearse(plan: Plan, rank: int) -> Rehearsal:
    try:
        return rehearse(
            plan.config,
            rank=rank,
            world_size=plan.world_size,
            device_kind=plan.device_kind,
            microbatches=plan.microbatches,
        )
    except UserError:
        raise
    except Exception as error:
        where = f"rank {rank} [{plan.shape.describe(rank)}]"
        raise RankFailed(f"{where} fails in its rehearsal, as it would in the job:\n{traceback.format_exc().rstrip()}") from error


def _alike(run: Rehearsal, ranks: Mapping[int, None], shape: MeshShape, *, keep: Sequence[int]) -> list[int]:
    """Those of `ranks` that would have answered alike; not those that run in any case."""
    return [rank for rank in ranks if rank not in keep and run.questions.same_answers(shape.coordinates(rank))]


def _join(runs: Mapping[int, Rehearsal], source: Mapping[int, int], shape: MeshShape) -> PartOfJob:
    logs: list[Log] = []
    place_of_run: dict[int, int] = {}
    for rank, run in runs.items():
        place = next((i for i, log in enumerate(logs) if log == run.log), len(logs))
        if place == len(logs):
            logs.append(run.log)
        place_of_run[rank] = place
    return PartOfJob(
        logs,
        log_of={rank: place_of_run[from_rank] for rank, from_rank in source.items()},
        groups={rank: renamed(runs[from_rank].groups, from_rank, rank, shape) for rank, from_rank in source.items()},
        ran=list(runs),
        num_actions_run=sum(run.num_run for run in runs.values()),
        num_actions_inferred=sum(run.num_inferred for run in runs.values()),
    )


def renamed(groups: Groups, rank: int, other: int, shape: MeshShape) -> dict[str, tuple[int, ...]]:
    """The groups of `rank` as `other` has them: where all members share the rank's coordinate on an axis, they have the other's."""
    if rank == other:
        return dict(groups)
    here, there = shape.coordinates(rank), shape.coordinates(other)
    moved_axes = [axis for axis in AXES if here[axis] != there[axis]]
    result = {}
    for name, members in groups.items():
        if len(members) == shape.num_ranks:
            result[name] = members
            continue
        at = [shape.coordinates(member) for member in members]
        shared = {axis: there[axis] for axis in moved_axes if all(each[axis] == here[axis] for each in at)}
        result[name] = tuple(shape.rank_of({**each, **shared}) for each in at)
    return result
