"""Add communication to a schedule: actions -> actions and exchanges, the list that the runtime executes strictly in order.

Between two actions of a stage lies a gap with at most one send (what the action before made) and one receive (what the action after
needs). Two messages of a gap with one neighbour become one Exchange if the neighbour has the same two in one gap of its own. The
stage's own list cannot tell: with two stages and two microbatches, stage 0 runs F0 F1 B0 B1 under 1F1B and when all forwards come
first, but only under 1F1B does stage 1 send gradient 0 next to receiving activation 1. Merging on one side alone would wait for
ever, as would sending before receiving on both sides when sends block. So `lower` reads the lists of the neighbours too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from megatronish.pipeline.schedules import Action, Backward, Forward

MAX_CHUNKS = 64
MAX_MICROBATCHES = 2**24
"""Together they keep a tag below 2**31: gloo takes a non-negative 32-bit integer."""


@dataclass(frozen=True, slots=True)
class Message:
    """One tensor on its way between neighbouring stages: an activation to the next, a gradient to the one before.

    `chunk` is that of the action which made it.
    """

    kind: Literal["activation", "gradient"]
    microbatch: int
    chunk: int = 0

    @property
    def tag(self) -> int:
        """A number below 2**31, unique for (kind, chunk, microbatch) within a step."""
        assert self.microbatch < MAX_MICROBATCHES and self.chunk < MAX_CHUNKS, self
        return (self.microbatch * MAX_CHUNKS + self.chunk) * 2 + (self.kind == "gradient")

    def __str__(self) -> str:
        return f"{self.kind} {self.microbatch}"


@dataclass(frozen=True, slots=True)
class Exchange:
    """Send and receive with one neighbour as one operation: it ends when all its messages have arrived.

    A runtime posts all of it before it waits for any of it (`batch_isend_irecv`).
    """

    peer_stage: int
    sends: tuple[Message, ...] = ()
    receives: tuple[Message, ...] = ()

    def __str__(self) -> str:
        directions = (("sends", self.sends), ("receives", self.receives))
        parts = [f"{verb} {', '.join(map(str, messages))}" for verb, messages in directions if messages]
        return f"exchange with stage {self.peer_stage} ({'; '.join(parts)})"


Step = Forward | Backward | Exchange


def lower(actions_by_stage: Sequence[Sequence[Action]], stage: int) -> list[Step]:
    """The steps of `stage`. In a gap with two neighbours the send comes first, so that nobody waits for a tensor that is ready.

    `actions_by_stage` are the actions of every stage (`schedules.actions_of_all_stages`); only those of `stage` and its neighbours
    are read. The first stage receives no activation and sends no gradient, the last sends no activation and receives no gradient.
    The result is sound only if `prove.prove` says so.
    """
    num_stages = len(actions_by_stage)
    nearby = range(max(stage - 1, 0), min(stage + 2, num_stages))
    return _lower({near: _gaps(actions_by_stage[near], near, num_stages) for near in nearby}, stage)


def lower_all_stages(actions_by_stage: Sequence[Sequence[Action]]) -> list[list[Step]]:
    """`lower` for every stage: what `prove.prove` takes."""
    gaps_by_stage = {stage: _gaps(actions, stage, len(actions_by_stage)) for stage, actions in enumerate(actions_by_stage)}
    return [_lower(gaps_by_stage, stage) for stage in gaps_by_stage]


def _lower(gaps_by_stage: Mapping[int, list[_Gap]], stage: int) -> list[Step]:
    """`gaps_by_stage` holds at least `stage` and its neighbours."""
    agreed = {
        (peer, received, sent)
        for peer in (stage - 1, stage + 1)
        for other, sent, received in (gap.meeting for gap in gaps_by_stage.get(peer, ()) if gap.meeting is not None)
        if other == stage
    }
    steps: list[Step] = []
    for gap in gaps_by_stage[stage]:
        if gap.meeting is not None and gap.meeting in agreed:
            peer, sent, received = gap.meeting
            steps.append(Exchange(peer, (sent,), (received,)))
        else:
            if gap.send is not None:
                steps.append(Exchange(gap.send[0], sends=(gap.send[1],)))
            if gap.receive is not None:
                steps.append(Exchange(gap.receive[0], receives=(gap.receive[1],)))
        if gap.action_after is not None:
            steps.append(gap.action_after)
    return steps


Traffic = tuple[int, Message]
"""(neighbour, message)"""


class _Gap(NamedTuple):
    """What lies between two actions."""

    send: Traffic | None
    receive: Traffic | None
    meeting: tuple[int, Message, Message] | None
    """(neighbour, sent, received) if both are with one neighbour."""
    action_after: Action | None
    """None at the end of the list."""


def _gaps(actions: Sequence[Action], stage: int, num_stages: int) -> list[_Gap]:
    """The gaps before, between and after the actions of a stage."""
    assert all(action.chunk == 0 for action in actions), "chunks need an edge from the last stage to the first"
    gaps = []
    for before, after in pairwise([None, *actions, None]):
        send = None if before is None else _send_after(before, stage, num_stages)
        receive = None if after is None else _receive_before(after, stage, num_stages)
        meeting = None
        if send is not None and receive is not None and send[0] == receive[0]:
            meeting = send[0], send[1], receive[1]
        gaps.append(_Gap(send, receive, meeting, after))
    return gaps


def _send_after(action: Action, stage: int, num_stages: int) -> Traffic | None:
    if isinstance(action, Forward):
        return (stage + 1, Message("activation", action.microbatch, action.chunk)) if stage < num_stages - 1 else None
    return (stage - 1, Message("gradient", action.microbatch, action.chunk)) if stage > 0 else None


def _receive_before(action: Action, stage: int, num_stages: int) -> Traffic | None:
    if isinstance(action, Forward):
        return (stage - 1, Message("activation", action.microbatch, action.chunk)) if stage > 0 else None
    return (stage + 1, Message("gradient", action.microbatch, action.chunk)) if stage < num_stages - 1 else None
