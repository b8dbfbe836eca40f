"""Add communication to a schedule: actions -> actions and exchanges, the list that the runtime executes strictly in order.

All exchanges of a step get one global order, that of the timeline in which every message leaves as soon as it is made, and each
stage does its own in that order. So stages never wait for each other in a circle, whatever the schedule: of all that is not done
yet, what is first in the global order can be done. Messages that two stages have for each other at one time become one Exchange.

A stage's own list cannot tell where its exchanges belong. With two stages and two microbatches stage 0 runs F0 F1 B0 B1 under 1F1B
and when all forwards come first, but only under 1F1B does stage 1 have gradient 0 ready when activation 1 is; with interleaving the
last stage also sends to the first. So `lower` reads the lists of all stages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatronish.pipeline.schedules import Action, Backward, Forward, count_chunks
from megatronish.pipeline.timeline import part_of, timeline

MAX_PARTS = 2**11
MAX_MICROBATCHES = 2**19
"""Together they keep a tag below 2**31: gloo takes a non-negative 32-bit integer."""


@dataclass(frozen=True, slots=True)
class Message:
    """One tensor on its way between stages: an activation to the part that follows, a gradient to the part before.

    `part` is that of the action which made it (`timeline.part_of`); with one chunk a stage it is the stage.
    """

    kind: Literal["activation", "gradient"]
    microbatch: int
    part: int

    @property
    def tag(self) -> int:
        """A number below 2**31, unique for (kind, part, microbatch) within a step."""
        assert self.microbatch < MAX_MICROBATCHES and self.part < MAX_PARTS, self
        return (self.microbatch * MAX_PARTS + self.part) * 2 + (self.kind == "gradient")

    def __str__(self) -> str:
        return f"{self.kind} {self.microbatch} of part {self.part}"


@dataclass(frozen=True, slots=True)
class Exchange:
    """Send and receive with one stage as one operation.

    A runtime posts all of it at once (`batch_isend_irecv`), in its place in the list.
    """

    peer_stage: int
    sends: tuple[Message, ...] = ()
    receives: tuple[Message, ...] = ()

    def __str__(self) -> str:
        directions = (("sends", self.sends), ("receives", self.receives))
        parts = [f"{verb} {', '.join(map(str, messages))}" for verb, messages in directions if messages]
        return f"exchange with stage {self.peer_stage} ({'; '.join(parts)})"


Step = Forward | Backward | Exchange


def output_of(action: Action, part: int, num_parts: int) -> Message | None:
    """What an action makes for another part: None for the last part's forward and the first part's backward."""
    if isinstance(action, Forward):
        return Message("activation", action.microbatch, part) if part < num_parts - 1 else None
    return Message("gradient", action.microbatch, part) if part > 0 else None


def needed_by(action: Action, part: int, num_parts: int) -> Message | None:
    """What an action needs of another part: None for the first part's forward and the last part's backward."""
    if isinstance(action, Forward):
        return Message("activation", action.microbatch, part - 1) if part > 0 else None
    return Message("gradient", action.microbatch, part + 1) if part < num_parts - 1 else None


def destination(message: Message) -> int:
    """The part that needs the message."""
    return message.part + (1 if message.kind == "activation" else -1)


def lower(actions_by_stage: Sequence[Sequence[Action]], stage: int) -> list[Step]:
    """The steps of `stage`, from the actions of every stage (`schedules.actions_of_all_stages`).

    What a stage makes for another of its own parts (one stage alone, with chunks) stays and is in no exchange. ValueError if the
    actions wait for each other for ever.
    """
    return Traffic(actions_by_stage).steps(stage)


def lower_all_stages(actions_by_stage: Sequence[Sequence[Action]]) -> list[list[Step]]:
    """`lower` for every stage: what `prove.prove` takes."""
    traffic = Traffic(actions_by_stage)
    return [traffic.steps(stage) for stage in range(len(actions_by_stage))]


class Traffic:
    """The actions of all stages (as of `lower`): when each starts, and when each message leaves, as soon as it is made."""

    def __init__(self, actions_by_stage: Sequence[Sequence[Action]]) -> None:
        self.num_stages = len(actions_by_stage)
        self.spans = timeline(actions_by_stage)
        num_parts = self.num_stages * count_chunks(actions_by_stage)
        self.between: defaultdict[tuple[int, int, int], list[Message]] = defaultdict(list)
        """(time, lower stage, higher stage) -> the messages between them, either way: one Exchange."""
        for stage, spans in enumerate(self.spans):
            for span in spans:
                message = output_of(span.action, part_of(span.action, stage, self.num_stages), num_parts)
                if message is not None and (peer := destination(message) % self.num_stages) != stage:
                    self.between[span.end, min(stage, peer), max(stage, peer)].append(message)
        self.of_stage: list[list[tuple[int, int, int]]] = [[] for _ in actions_by_stage]
        for key in sorted(self.between):
            for stage in key[1:]:
                self.of_stage[stage].append(key)

    def steps(self, stage: int) -> list[Step]:
        """See `lower`."""
        # An action that starts when an exchange happens may need what it brings; one that is under way then made it, or ends first.
        steps: list[Step] = []
        exchanges = iter(self.of_stage[stage])
        key = next(exchanges, None)
        for span in self.spans[stage]:
            while key is not None and key[0] <= span.start:
                steps.append(_exchange(self, key, stage))
                key = next(exchanges, None)
            steps.append(span.action)
        while key is not None:
            steps.append(_exchange(self, key, stage))
            key = next(exchanges, None)
        return steps


def _exchange(traffic: Traffic, key: tuple[int, int, int], stage: int) -> Exchange:
    _, low, high = key
    messages = traffic.between[key]
    return Exchange(
        high if stage == low else low,
        sends=tuple(m for m in messages if m.part % traffic.num_stages == stage),
        receives=tuple(m for m in messages if m.part % traffic.num_stages != stage),
    )
