"""What one stage computes, in which order: lists of actions. Communication is added by `lower.py`, checked by `prove.py`.

The layers are cut into `num_stages * num_chunks` parts, dealt out round-robin: chunk c of stage s is part `c * num_stages + s`. A
microbatch goes forwards through the parts in order, and backwards in the opposite order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Forward:
    """Run the forward of `microbatch` through the layers of `chunk` of this stage."""

    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"F{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


@dataclass(frozen=True, slots=True)
class Backward:
    """Run the backward of `microbatch` through the layers of `chunk`: input gradient and weight gradients."""

    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"B{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


Action = Forward | Backward


def gpipe(stage: int, num_stages: int, num_microbatches: int) -> list[Action]:
    """All forwards, then all backwards: as little idle time as 1F1B, with every microbatch of the step in flight.

    Source: Huang et al. 2019; the order of backwards is that of Narayanan et al. 2021, figure 3.
    """
    assert 0 <= stage < num_stages and num_microbatches >= 1, (stage, num_stages, num_microbatches)
    return [kind(i) for kind in (Forward, Backward) for i in range(num_microbatches)]


def one_f_one_b(stage: int, num_stages: int, num_microbatches: int) -> list[Action]:
    """1F1B: fill the stages behind this one, then alternate, then drain. At most min(m, num_stages - stage) microbatches in flight.

    Source: Narayanan et al. 2021 (PipeDream-Flush, section 2.2.1). With fewer microbatches than stages the early stages have no
    steady phase.
    """
    assert 0 <= stage < num_stages and num_microbatches >= 1, (stage, num_stages, num_microbatches)
    num_warmup = min(num_stages - 1 - stage, num_microbatches)
    return _fill_alternate_drain(
        [Forward(i) for i in range(num_microbatches)], [Backward(i) for i in range(num_microbatches)], num_warmup
    )


def interleaved(stage: int, num_stages: int, num_microbatches: int, num_chunks: int) -> list[Action]:
    """Interleaved 1F1B: rounds of `num_stages` microbatches pass through chunk after chunk, so that a stage waits for the first
    and last microbatch through 1 / num_chunks of its layers only.

    Source: Narayanan et al. 2021, section 2.2.2. Any number of microbatches: where the stages do not divide it, the last round is
    that of a larger step with the missing microbatches left out, and idles in their place. What is left of an order in which every
    action finds its input still has that property.
    """
    assert 0 <= stage < num_stages and num_microbatches >= 1 and num_chunks >= 1, (stage, num_stages, num_microbatches, num_chunks)
    num_rounds = -(-num_microbatches // num_stages)
    order = [(r * num_stages + i, chunk) for r in range(num_rounds) for chunk in range(num_chunks) for i in range(num_stages)]
    forwards = [Forward(i, chunk) for i, chunk in order]
    backwards = [Backward(i, num_chunks - 1 - chunk) for i, chunk in order]
    num_warmup = min(2 * (num_stages - 1 - stage) + (num_chunks - 1) * num_stages, len(order))
    actions = _fill_alternate_drain(forwards, backwards, num_warmup)
    return [action for action in actions if action.microbatch < num_microbatches]


def _fill_alternate_drain(forwards: Sequence[Forward], backwards: Sequence[Backward], num_warmup: int) -> list[Action]:
    """`num_warmup` forwards, then forward and backward in turns, then the backwards that are left."""
    num_steady = len(forwards) - num_warmup
    steady = [action for pair in zip(forwards[num_warmup:], backwards[:num_steady], strict=True) for action in pair]
    return [*forwards[:num_warmup], *steady, *backwards[num_steady:]]


@dataclass(frozen=True)
class Schedule:
    """A row of SCHEDULES."""

    of_stage: Callable[[int, int, int, int], list[Action]]
    """(stage, num_stages, num_microbatches, num_chunks) -> the actions of that stage, in order."""
    has_chunks: bool
    """A stage may have more than one chunk."""
    source: str


SCHEDULES: dict[str, Schedule] = {
    "1f1b": Schedule(lambda s, p, m, v: one_f_one_b(s, p, m), False, "Narayanan et al. 2021, section 2.2.1"),
    "gpipe": Schedule(lambda s, p, m, v: gpipe(s, p, m), False, "Huang et al. 2019"),
    "interleaved": Schedule(interleaved, True, "Narayanan et al. 2021, section 2.2.2"),
}


def actions_of_all_stages(name: str, num_stages: int, num_microbatches: int, *, num_chunks: int = 1) -> list[list[Action]]:
    """The list of every stage under schedule `name` of SCHEDULES: what `lower.lower` needs, since stages must agree on each
    exchange."""
    schedule = SCHEDULES[name]
    assert num_chunks == 1 or schedule.has_chunks, f"{name} has one chunk a stage"
    return [schedule.of_stage(stage, num_stages, num_microbatches, num_chunks) for stage in range(num_stages)]


def count_chunks(actions_by_stage: Iterable[Iterable[object]]) -> int:
    """Chunks of a stage in the lists of all stages."""
    steps = (step for steps in actions_by_stage for step in steps)
    return 1 + max((step.chunk for step in steps if isinstance(step, Forward | Backward)), default=0)


def peak_in_flight(actions: Iterable[object]) -> int:
    """Most forwards whose backward has not run: how many (microbatch, chunk) the stage keeps activations of. Other steps are
    skipped."""
    in_flight = peak = 0
    for action in actions:
        if isinstance(action, Forward):
            in_flight += 1
            peak = max(peak, in_flight)
        elif isinstance(action, Backward):
            in_flight -= 1
    return peak
