"""One training step of every stage in unit time, from what one rank of each recorded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from megatronish.comm.history import Event
from megatronish.pipeline.schedules import Action, Backward, Forward
from megatronish.pipeline.timeline import timeline_as_far_as_it_goes
from megatronish.preflight.job import Job, Log
from megatronish.preflight.traffic import STEP

_ACTION = re.compile(r"([FB])(\d+)(?:\.(\d+))?$")

EXCHANGE = "exchange"
"""The action of what pipeline/runtime.py posts between forwards and backwards."""


@dataclass
class Recorded:
    """A forward or backward."""

    action: Action
    parts: list[tuple[Event, ...]] = field(default_factory=list)
    """What it communicated."""
    exchanges: list[tuple[Event, ...]] = field(default_factory=list)
    """Posted after it, before the next."""
    is_inferred: bool = False
    start: int | None = None
    """None: it never runs."""
    end: int | None = None


@dataclass
class Stage:
    """What one rank of a stage did in a training step."""

    stage: int
    rank: int
    steps: list[Recorded] = field(default_factory=list)
    before: list[tuple[Event, ...]] = field(default_factory=list)
    """What it communicated before the first action."""
    after: list[tuple[Event, ...]] = field(default_factory=list)
    """What it communicated after the last."""

    @property
    def busy(self) -> int:
        """Units of time."""
        return sum(step.end - step.start for step in self.steps if step.end is not None and step.start is not None)

    @property
    def stuck_at(self) -> Action | None:
        """The first action that never runs."""
        return next((step.action for step in self.steps if step.start is None), None)


@dataclass(frozen=True)
class Stages:
    """A training step of all stages."""

    step: int
    """0 if none was recorded."""
    stages: Sequence[Stage]

    @property
    def makespan(self) -> int:
        """Units of time until the last action ends."""
        return max((step.end or 0 for stage in self.stages for step in stage.steps), default=0)

    @property
    def idle_share(self) -> float:
        """Of all stages' time, 0 to 1."""
        total = self.makespan * len(self.stages)
        return 1 - sum(stage.busy for stage in self.stages) / total if total else 0.0


@cache
def parse_action(text: str) -> Action | None:
    """`F3` or `B3.1` of `Moment.action`; None for anything else."""
    found = _ACTION.match(text)
    if found is None:
        return None
    kind, microbatch, chunk = found.groups()
    return (Forward if kind == "F" else Backward)(int(microbatch), int(chunk or 0))


def last_step(log: Log) -> int:
    """The last training step in a log; 0 if there is none."""
    return max((moment.step for moment, _, _ in log.spans if moment.phase == STEP), default=0)


def read_stage(log: Log, stage: int, rank: int, step: int) -> Stage:
    """What a log says of one training step."""
    result = Stage(stage, rank)
    for moment, events, is_inferred in log.spans:
        if moment.phase != STEP or moment.step != step:
            continue
        action, steps = parse_action(moment.action), result.steps
        if action is not None:
            if not steps or steps[-1].action != action or steps[-1].exchanges:
                steps.append(Recorded(action))
            steps[-1].parts.append(events)
            steps[-1].is_inferred |= is_inferred
        elif not steps:
            result.before.append(events)
        elif moment.action == EXCHANGE:
            steps[-1].exchanges.append(events)
        else:
            result.after.append(events)
    return result


def read_stages(job: Job, *, like: int = 0, step: int | None = None) -> Stages:
    """A training step of every stage, the last if none is given, on the ranks that share all other coordinates with rank `like`."""
    place = job.shape.coordinates(like)
    ranks = [job.shape.rank_of({**place, "pp": stage}) for stage in range(job.shape.pp)]
    if step is None:
        step = max(map(last_step, {id(log): log for log in map(job.log, ranks)}.values()))
    stages = [read_stage(job.log(rank), stage, rank, step) for stage, rank in enumerate(ranks)]
    spans = timeline_as_far_as_it_goes([[recorded.action for recorded in stage.steps] for stage in stages])
    for stage, mine in zip(stages, spans, strict=True):
        for recorded, span in zip(stage.steps, mine, strict=False):
            recorded.start, recorded.end = span.start, span.end
    return Stages(step, stages)
