"""When each action runs if a forward of a chunk takes 1, a backward 2, and communication nothing: the clock of all orders and
drawings."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from megatronish.pipeline.schedules import Action, Backward, Forward, actions_of_all_stages, count_chunks

FORWARD_UNITS = 1
BACKWARD_UNITS = 2
"""Input gradient and weight gradient are each one product of the size of the forward's."""


@dataclass(frozen=True, slots=True)
class Span:
    """An action and when it runs."""

    action: Action
    start: int
    end: int


def units(action: Action) -> int:
    """How long an action takes."""
    return FORWARD_UNITS if isinstance(action, Forward) else BACKWARD_UNITS


def part_of(action: Action, stage: int, num_stages: int) -> int:
    """The part of the layers that an action of `stage` runs."""
    return action.chunk * num_stages + stage


Work = tuple[type[Action], int, int]
"""(Forward or Backward, microbatch, part)"""


def input_of(action: Action, part: int, num_parts: int) -> Work | None:
    """What must have run, elsewhere or here, to give the action its input: the part before, or for a backward the part after;
    None for the first part's forward and the last part's backward."""
    if isinstance(action, Forward):
        return (Forward, action.microbatch, part - 1) if part > 0 else None
    return (Backward, action.microbatch, part + 1) if part < num_parts - 1 else None


def timeline(actions_by_stage: Sequence[Sequence[Action]]) -> list[list[Span]]:
    """The lists of all stages run as early as their order and inputs allow. ValueError if they wait for each other for ever."""
    spans = timeline_as_far_as_it_goes(actions_by_stage)
    lists = enumerate(zip(actions_by_stage, spans, strict=True))
    stuck = [f"stage {stage} at {actions[len(mine)]}" for stage, (actions, mine) in lists if len(mine) < len(actions)]
    if stuck:
        raise ValueError(f"these lists of actions never end: {', '.join(stuck)} wait for inputs that nobody makes before")
    return spans


def timeline_as_far_as_it_goes(actions_by_stage: Sequence[Sequence[Action]]) -> list[list[Span]]:
    """`timeline`, where a list ends before the first action whose input nobody makes."""
    num_stages = len(actions_by_stage)
    num_parts = num_stages * count_chunks(actions_by_stage)
    ends: dict[Work, int] = {}
    waiting: dict[Work, int] = {}  # what a stage waits for -> the stage; one stage alone needs each
    spans: list[list[Span]] = [[] for _ in actions_by_stage]
    ready = deque(range(num_stages))
    while ready:
        stage = ready.popleft()
        mine, actions = spans[stage], actions_by_stage[stage]
        clock = mine[-1].end if mine else 0
        for action in actions[len(mine) :]:
            part = part_of(action, stage, num_stages)
            needed = input_of(action, part, num_parts)
            if needed is not None:
                if needed not in ends:
                    waiting[needed] = stage
                    break
                clock = max(clock, ends[needed])
            mine.append(Span(action, clock, clock + units(action)))
            clock += units(action)
            work = (type(action), action.microbatch, part)
            ends[work] = clock
            if work in waiting:
                ready.append(waiting.pop(work))
    return spans


def makespan(spans_by_stage: Sequence[Sequence[Span]]) -> int:
    """End of the last action."""
    return max((spans[-1].end for spans in spans_by_stage if spans), default=0)


def idle_of(schedule: str, num_stages: int, num_microbatches: int, *, num_chunks: int = 1) -> float:
    """`idle_fraction` of a row of SCHEDULES."""
    return idle_fraction(timeline(actions_of_all_stages(schedule, num_stages, num_microbatches, num_chunks=num_chunks)))


def idle_fraction(spans_by_stage: Sequence[Sequence[Span]]) -> float:
    """Share of all stages' time without work, 0 to 1."""
    total = makespan(spans_by_stage) * len(spans_by_stage)
    busy = sum(span.end - span.start for spans in spans_by_stage for span in spans)
    return 1 - busy / total if total else 0.0
